"""The method of a run of the harness, from the words after `--model_args`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...methods.base import Method
from ...methods.from_text import build_method, parse_budget
from ...methods.no_pruning import NoPruning
from ..settings import FULL

EMBEDDED = "embedded"
"""Calls the model inside the package, where a checkpoint's folder or hub name could stand."""
MODEL_ARGS = (
    "pretrained", "method", "budget", "device", "dtype", "max_frames", "system_prompt", "costs",
)  # fmt: skip


def method_of(method: str, budget: Any, options: Mapping[str, Any]) -> Method:
    """The method as `--model_args` has it: the harness turns values that look like numbers into numbers.

    Args:
        method: as `autoprune methods` lists it, a file that ends in .json, or "full" for none.
        budget: 64, "1/9", "11%"; None for 64, or for that of the file.
        options: of the method.

    Raises:
        ValueError: no such method or option, or a value that does not fit; what there is, is named.
    """
    if method == FULL:
        given = [*options, *([] if budget is None else ["budget"])]
        if given:
            raise ValueError(
                f"method={FULL} prunes nothing and takes no {given[0]!r}; leave it out, or name a method"
            )
        return NoPruning()
    share = None if budget is None else parse_budget(_as_text(budget))
    try:
        return build_method(method, share, {}, [f"{k}={_as_text(v)}" for k, v in options.items()])
    except ValueError as error:
        unknown = [name for name in options if f"no option {name!r}" in str(error)]
        if not unknown:
            raise
        raise ValueError(
            f"{error}; beside them --model_args takes {', '.join(MODEL_ARGS)}"
        ) from error


def _as_text(value: Any) -> str:
    """A value as it was typed, as far as that can be known."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
