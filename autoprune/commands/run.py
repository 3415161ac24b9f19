"""`autoprune run`: one answer about one picture, at the price that was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.table import Table

from .. import __version__
from ..files import check_picture_path, write_whole
from ..images import load_image
from ..loading import Loaded, load_embedded, load_model, prepare
from ..methods.base import Method
from ..trace import Sample
from ..viz import kept_patches, to_png
from .answers import Answer, answer, answer_pruned
from .pictures import as_seen
from .report import bits, can_draw, print_json, sample_record, saved, sparkline


@dataclass(frozen=True)
class Request:
    """What to run and how to show it."""

    image: str | Path
    question: str
    method: Method
    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_new_tokens: int = 64
    compare: bool = False
    as_json: bool = False
    picture: Path | None = None


def run(request: Request, console: Console) -> None:
    """Answer the question and show what it cost; everything that can be wrong is checked first.

    Raises:
        ValueError: bad input; see `load_image` and `load_model`.
        UnsupportedError: a model that cannot be pruned.
    """
    if not request.question.strip():
        raise ValueError("the question is empty")
    if request.picture is not None:
        check_picture_path(request.picture)
    image = load_image(request.image)
    where = (request.device, request.dtype)
    loaded = load_embedded(*where) if request.model is None else load_model(request.model, *where)
    inputs = prepare(loaded, image, request.question)
    seen = None if request.picture is None else as_seen(loaded, inputs, image)
    if loaded.model.device.type != "cpu":
        # The first run on an accelerator loads its kernels, which says nothing of the model.
        answer_pruned(loaded, inputs, request.method, 1)
    pruned, sample = answer_pruned(loaded, inputs, request.method, request.max_new_tokens)
    full = answer(loaded, inputs, request.max_new_tokens) if request.compare else None
    if request.picture is not None and seen is not None:
        title = f"{request.question}  {pruned.text}"
        write_whole(request.picture, to_png(kept_patches(seen[0], sample, seen[1], title=title)))
    if request.as_json:
        print_json(console, record(request, loaded, image, pruned, sample, full))
    else:
        show(request, loaded, pruned, sample, full, console)


def record(
    request: Request,
    loaded: Loaded,
    image: Image.Image,
    pruned: Answer,
    sample: Sample,
    full: Answer | None,
) -> dict[str, Any]:
    """What ran on what, what was answered, and what it cost, for JSON."""
    whole = {
        "image": str(request.image),
        "image_size": list(image.size),
        "question": request.question,
        "answer": pruned.text,
        "model": loaded.name,
        "device": str(loaded.model.device),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "method": request.method.name,
        "budget": str(request.method.budget),
        "versions": {
            "autoprune": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seconds": pruned.seconds,
        "first_token_seconds": pruned.first_token_seconds,
        **sample_record(sample),
    }
    if full is not None:
        whole["answer_unpruned"] = full.text
        whole["seconds_unpruned"] = full.seconds
        whole["first_token_seconds_unpruned"] = full.first_token_seconds
    if request.picture is not None:
        whole["picture"] = str(request.picture)
    return whole


def show(
    request: Request,
    loaded: Loaded,
    pruned: Answer,
    sample: Sample,
    full: Answer | None,
    console: Console,
) -> None:
    """The same as a table."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    counts = sample.tokens_per_layer
    table.add_row("answer", pruned.text)
    if full is not None:
        table.add_row("unpruned", full.text)
    table.add_row("model", f"{loaded.name}, {len(counts)} layers")
    table.add_row("method", f"{request.method.name}, {request.method.budget}")
    table.add_row(
        "visual tokens",
        f"{sample.mean_tokens:.4g} of {sample.num_visual} per layer: {_listed(counts)}",
    )
    table.add_row("", sparkline(counts, sample.num_visual, can_draw(console)))
    if sample.mutual_information is not None:
        table.add_row("information", f"{bits(sample.mutual_information)} bits")
    table.add_row(
        "prefill FLOPs",
        f"{sample.total_flops / 1e9:.4g} G, {saved(sample.total_flops, sample.flops_full)} saved",
    )
    table.add_row(
        "KV cache",
        f"{sample.kv_bytes / 1e6:.4g} MB, {saved(sample.kv_bytes, sample.kv_bytes_full)} saved",
    )
    table.add_row("time", _time(pruned))
    if full is not None:
        table.add_row("", f"unpruned: {_time(full)}")
    if request.picture is not None:
        table.add_row("picture", str(request.picture))
    console.print(table)
    console.print("A time is that of one run, vision tower included; `autoprune bench` measures.")
    if sample.num_visual and sample.mean_tokens == sample.num_visual:
        console.print("The budget pays for all visual tokens: nothing was pruned.")


def _time(given: Answer) -> str:
    return (
        f"first token after {given.first_token_seconds:.3g} s, answer after {given.seconds:.3g} s"
    )


def _listed(counts: list[int]) -> str:
    """`144, 15, 7 x 13, 6`."""
    runs: list[list[int]] = []
    for count in counts:
        if runs and runs[-1][0] == count:
            runs[-1][1] += 1
        else:
            runs.append([count, 1])
    return ", ".join(f"{count} x {times}" if times > 1 else str(count) for count, times in runs)
