"""The page of one prompt: both answers, the pictures, and what it cost."""

from __future__ import annotations

import torch
import transformers

from .. import __version__
from ..viz import to_png
from ..viz.page import Html, code, heading, page, paragraph, picture, table
from .explanation import Explanation, figures
from .report import bits, saved

_WHAT = {
    "kept": (
        "What was kept",
        "The picture, and the patches that enter a layer. Dropped patches are veiled.",
    ),
    "views": (
        "What was kept of each picture",
        "How many tokens of each picture enter each layer. A token of this model is no patch, so counts are "
        "drawn in the place of patches.",
    ),
    "summary": (
        "What the summary token stands for",
        "One token stands for all tokens that were dropped; they are tinted. It takes the place in the frame.",
    ),
    "attention": (
        "Where the question settles",
        "Attention of the text behind the picture on the picture, mean over heads and words, in the unpruned "
        "model. Each map is scaled to the largest value of its layer, in shades that follow the root.",
    ),
    "retention": (
        "The retention curve",
        "This prompt's schedule between two others that spend the same budget. Little mutual information is a "
        "hard prompt, kept early and narrowed late; much is an easy one, pruned hard early.",
    ),
    "tokens": (
        "Tokens per layer",
        "Visual tokens that enter each layer, and the flat schedule that spends the same.",
    ),
}


def explanation_page(found: Explanation, animation: bytes | None) -> str:
    """The page as HTML, light or dark as the reader's system is."""
    request = found.request
    light, dark = (figures(found, is_dark) for is_dark in (False, True))
    parts = [
        table(
            ("", "answer"),
            [("pruned", found.pruned.text), ("all visual tokens", found.full.text)],
            texts=True,
        ),
        heading("What it cost"),
        _costs(found),
        paragraph("A time is that of one run, vision tower included; autoprune bench measures."),
    ]
    if found.no_views:
        parts.append(paragraph(found.no_views))
    for name, figure in light.items():
        title, words = _WHAT[name]
        parts += [heading(title), picture(to_png(figure), title, words, to_png(dark[name]))]
        if name == "kept" and animation is not None:
            parts.append(picture(animation, "Kept patches layer by layer", "Layer by layer."))
    parts += [heading("To repeat it"), code(request.command), _settings(found)]
    return page(request.question, parts)


def _costs(found: Explanation) -> Html:
    sample = found.sample
    rows = [
        (
            "visual tokens, mean per layer",
            f"{sample.mean_tokens:.4g}",
            str(sample.num_visual),
            saved(sample.mean_tokens, sample.num_visual),
        ),
        (
            "prefill FLOPs of the decoder",
            f"{sample.total_flops / 1e9:.4g} G",
            f"{sample.flops_full / 1e9:.4g} G",
            saved(sample.total_flops, sample.flops_full),
        ),
        (
            "KV cache",
            f"{sample.kv_bytes / 1e6:.4g} MB",
            f"{sample.kv_bytes_full / 1e6:.4g} MB",
            saved(sample.kv_bytes, sample.kv_bytes_full),
        ),
        _time("first token", found.pruned.first_token_seconds, found.full.first_token_seconds),
        _time("whole answer", found.pruned.seconds, found.full.seconds),
        ("mutual information", f"{bits(sample.mutual_information)} bits", "", ""),
    ]
    return table(("", "pruned", "all visual tokens", "saved"), rows)


def _time(what: str, pruned: float, full: float) -> tuple[str, str, str, str]:
    return (
        f"time to the {what}",
        f"{pruned * 1e3:.4g} ms",
        f"{full * 1e3:.4g} ms",
        saved(pruned, full),
    )


def _settings(found: Explanation) -> Html:
    request, model = found.request, found.loaded.model
    dtype = str(model.dtype).removeprefix("torch.")
    rows = [
        ("model", f"{found.loaded.name}, {len(found.sample.kept)} layers, {model.device}, {dtype}"),
        ("method", repr(request.method)),
        ("tokens entering each layer", ", ".join(map(str, found.sample.tokens_per_layer))),
        (
            "versions",
            f"autoprune {__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
        ),
    ]
    return table((), rows, texts=True)
