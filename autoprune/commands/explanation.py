"""One prompt, measured: pruned, plain, and what the unpruned model looks at; and its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..engine.locate import locate
from ..images import load_image
from ..loading import Loaded, load_embedded, load_model, prepare
from ..methods.autoprune import AutoPrune
from ..methods.looking import Looked, look
from ..models.senna import CAMERAS
from ..trace import Sample
from ..viz import (
    View,
    attention_over_depth,
    kept_by_view,
    kept_over_depth,
    retention_curves,
    summary_over_depth,
    tokens_against_flat,
    views_of,
)
from .answers import Answer, answer, answer_pruned
from .pictures import views
from .run import Request

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCE_QUESTIONS = 27
"""Built-in questions, three of each kind, between whose information that of a prompt is shown."""

Bits = tuple[float, float]


@dataclass(frozen=True)
class ExplainRequest(Request):
    """What to explain; the fields of `Request` mean what they mean there.

    output: folder of the pictures. report: a page of all, or None. layers: depths that are drawn; None chooses.
    reference: the least and the most information of other prompts, in bits; None takes those of built-in
    questions on the embedded model, and elsewhere the whole range of curves. dark: pictures on dark paper.
    command: the call as it was typed, for the page. others: the pictures behind the first one.
    """

    output: Path = Path("explain")
    report: Path | None = None
    layers: Sequence[int] | None = None
    reference: Bits | None = None
    dark: bool = False
    command: str = "autoprune explain"
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """All that was measured of one prompt.

    images: all of the prompt's pictures; image: the first.
    views: empty where the family's grid is not known, and then `no_views` says so. ends: information and
    schedule of the two ends of the reference, least first; None if the method knows no information.
    """

    request: ExplainRequest
    images: list[Image.Image]
    loaded: Loaded
    pruned: Answer
    full: Answer
    sample: Sample
    looked: Looked
    views: list[View]
    no_views: str
    ends: list[tuple[float, list[int]]] | None
    names: tuple[str, str]

    @property
    def image(self) -> Image.Image:
        return self.images[0]


def measure(request: ExplainRequest) -> Explanation:
    """Run the model: pruned, plain, and once to look at the attention of every layer."""
    images = [load_image(path) for path in (request.image, *request.others)]
    where = (request.device, request.dtype)
    loaded = load_embedded(*where) if request.model is None else load_model(request.model, *where)
    inputs = prepare(loaded, images, request.question)
    # The first run loads and compiles what the others find ready, so it is not timed.
    answer_pruned(loaded, inputs, request.method, 1)
    pruned, sample = answer_pruned(loaded, inputs, request.method, request.max_new_tokens)
    full = answer(loaded, inputs, request.max_new_tokens)
    looked = look(loaded.model, inputs)
    try:
        seen, no_views = _views(loaded, inputs, images, looked), ""
    except ValueError:
        seen, no_views = (
            [],
            f"Where the visual tokens of {loaded.model.config.model_type} lie in the picture is not known, so "
            "kept patches and maps of attention are not drawn.",
        )
    ends, names = _ends(request, loaded, sample)
    return Explanation(
        request, images, loaded, pruned, full, sample, looked, seen, no_views, ends, names
    )


def _views(loaded: Loaded, inputs: Any, images: list[Image.Image], looked: Looked) -> list[View]:
    if len(images) == 1:
        return views(loaded, inputs, images[0], looked)
    if looked.places is None:
        raise ValueError("where tokens lie is not known")
    # Raises if a picture is shown in several tiles.
    return views_of(images, looked.places.numpy())


def figures(found: Explanation, dark: bool = False) -> dict[str, Figure]:
    """The figures that can be drawn, by the name of their file without its ending."""
    request, sample = found.request, found.sample
    drawn: dict[str, Figure] = {}
    if found.views:
        title = f"{request.question}  {found.pruned.text}"
        drawn["kept"] = kept_over_depth(found.views, sample, request.layers, title, dark)
    if not found.views and found.request.others and len(sample.pictures) == len(found.images):
        drawn["views"] = kept_by_view(found.images, sample, _names(found), dark)
    if found.views and sample.summary_token is not None:
        drawn["summary"] = summary_over_depth(found.views, sample, request.layers, dark)
    drawn["attention"] = attention_over_depth(
        found.looked.attention.numpy(), found.views, request.layers, dark
    )
    if found.ends is not None and sample.mutual_information is not None:
        least, most = found.ends
        this = sample.mutual_information, sample.tokens_per_layer
        drawn["retention"] = retention_curves(least, this, most, found.names, dark)
    drawn["tokens"] = tokens_against_flat(sample, dark)
    return drawn


def _names(found: Explanation) -> list[str]:
    """What the pictures are called: a car's by their cameras, others by their numbers."""
    number = len(found.images)
    if found.loaded.model.config.model_type == "senna" and number == len(CAMERAS):
        return list(CAMERAS)
    return [f"picture {place}" for place in range(1, number + 1)]


def _ends(
    request: ExplainRequest, loaded: Loaded, sample: Sample
) -> tuple[list[tuple[float, list[int]]] | None, tuple[str, str]]:
    """Information and schedule of the two ends of the reference, and what they are called."""
    method = request.method
    if not isinstance(method, AutoPrune) or sample.mutual_information is None:
        return None, ("", "")
    if request.reference is not None:
        bits, of = request.reference, "least given, most given"
    elif request.model is None:
        bits = _built_in(loaded, method)
        of = f"least of {REFERENCE_QUESTIONS} questions, most of {REFERENCE_QUESTIONS} questions"
    else:
        bits, of = (0.0, information_of_flat(method, sample)), "no information, flat curve"
    ends = schedules_at(bits, loaded, method, sample)
    least, _, most = of.partition(", ")
    return ends, (least, most)


def information_of_flat(method: AutoPrune, sample: Sample) -> float:
    """The information, in bits, from which on the curve is flat; that of the prompt if it has more."""
    flat = method.k0 / method.gamma if method.gamma > 0 else 0.0
    return max(flat, sample.mutual_information or 0.0)


def schedules_at(
    bits: Bits, loaded: Loaded, method: AutoPrune, sample: Sample
) -> list[tuple[float, list[int]]]:
    """Two amounts of information, and what the prompt's schedule would be with each."""
    cost, layers = locate(loaded.model).present_cost(), len(sample.tokens_per_layer)
    return [
        (value, method.plan(layers, sample.num_visual, value, sample.num_text, cost))
        for value in bits
    ]


def _built_in(loaded: Loaded, method: AutoPrune) -> Bits:
    """The least and the most information of questions that the embedded model knows how to answer."""
    from .. import tiny

    measured = []
    for scene, question in tiny.heldout_questions(REFERENCE_QUESTIONS):
        inputs = prepare(loaded, scene.image, question.text)
        _, sample = answer_pruned(loaded, inputs, replace(method, noise=0.0), 1)
        assert sample.mutual_information is not None
        measured.append(sample.mutual_information)
    return min(measured), max(measured)
