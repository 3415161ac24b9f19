"""`autoprune drive`: what a car is to do, from the pictures of its six cameras."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..files import check_picture_path, write_whole
from ..images import load_image
from ..loading import load_model, prepare
from ..models.senna import CAMERAS
from ..models.senna.planning import Plan, parse_plan
from ..trace import Sample
from ..viz import kept_by_view, matplotlib_parts, to_png
from .answers import answer, answer_pruned
from .report import print_json
from .run import Request, record, show

NO_MODEL = (
    "drive needs a checkpoint of Senna: get rb93dett/Senna from the Hugging Face hub, convert it by `python -m "
    "autoprune.models.senna CHECKPOINT OUTPUT`, and give --model OUTPUT"
)
_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


@dataclass(frozen=True)
class DriveRequest(Request):
    """The fields of `Request`, and `frames`: paths of the pictures, in the order of `CAMERAS`."""

    frames: tuple[Path, ...] = ()


def find_frames(given: Sequence[str]) -> tuple[Path, ...]:
    """The six pictures of a folder, by the cameras' names in those of the files; or six paths as they are.

    Raises:
        ValueError: there are neither, or a camera has no picture or several.
    """
    if len(given) == len(CAMERAS):
        return tuple(Path(path) for path in given)
    if len(given) != 1 or not Path(given[0]).is_dir():
        shown = repr(given[0]) if len(given) == 1 else f"{len(given)} paths"
        raise ValueError(
            f"expected a folder with a picture of each camera, or six pictures in the order "
            f"{', '.join(CAMERAS)}; got {shown}"
        )
    found: dict[str, list[Path]] = {camera: [] for camera in CAMERAS}
    for path in sorted(Path(given[0]).iterdir()):
        if path.suffix.lower() in _ENDINGS:
            # CAM_FRONT is a part of CAM_FRONT_LEFT.
            named = [camera for camera in CAMERAS if camera in path.stem.upper()]
            if named:
                found[max(named, key=len)].append(path)
    for camera, paths in found.items():
        if len(paths) != 1:
            raise ValueError(
                f"the folder {given[0]!r} holds {len(paths)} pictures of {camera}, expected one with that "
                "name in its own"
            )
    return tuple(path for (path,) in found.values())


def drive(request: DriveRequest, console: Console) -> None:
    """Ask for the plan, and show it with what was kept of each view and what was saved.

    Raises:
        ValueError: bad input; see `load_image` and `load_model`.
        ImportError: matplotlib is missing, for a picture.
    """
    if request.model is None:
        raise ValueError(NO_MODEL)
    if request.picture is not None:
        check_picture_path(request.picture)
        matplotlib_parts()
    images = [load_image(path) for path in request.frames]
    loaded = load_model(request.model, request.device, request.dtype)
    kind = loaded.model.config.model_type
    if kind != "senna":
        raise ValueError(f"{request.model!r} is a {kind!r} model; {NO_MODEL}")
    inputs = prepare(loaded, images, request.question)
    pruned, sample = answer_pruned(loaded, inputs, request.method, request.max_new_tokens)
    full = answer(loaded, inputs, request.max_new_tokens) if request.compare else None
    plan = _plan(pruned.text)
    if request.picture is not None:
        figure = kept_by_view(images, sample, CAMERAS)
        write_whole(request.picture, to_png(figure))
    if request.as_json:
        written = record(request, loaded, images[0], pruned, sample, full)
        for name in ("image", "image_size"):
            del written[name]
        written["plan"] = None if plan is None else plan._asdict()
        written["views"] = [
            {"camera": camera, "image": str(path), "tokens": tokens, "kept": kept}
            for camera, path, tokens, kept in zip(
                CAMERAS, request.frames, sample.pictures, _kept(sample), strict=True
            )
        ]
        print_json(console, written)
        return
    if plan is None:
        console.print("plan: none, as the answer has another form than SPEED, PATH")
    else:
        console.print(f"plan: speed {plan.speed}, path {plan.path}")
    show(request, loaded, pruned, sample, full, console)
    console.print(_views(sample))


def _plan(text: str) -> Plan | None:
    try:
        return parse_plan(text)
    except ValueError:
        return None


def _kept(sample: Sample) -> list[list[int]]:
    """Tokens entering each layer, of each view."""
    layers = [sample.kept_by_picture(layer) for layer in range(len(sample.tokens_per_layer))]
    return [list(counts) for counts in zip(*layers, strict=True)]


def _views(sample: Sample) -> Table:
    table = Table("view", "tokens", "kept, mean per layer", "in the last layer")
    for camera, tokens, kept in zip(CAMERAS, sample.pictures, _kept(sample), strict=True):
        mean = sum(kept) / len(kept)
        table.add_row(camera, str(tokens), f"{mean:.4g}", str(kept[-1]))
    return table
