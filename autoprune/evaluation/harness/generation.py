"""What a task of the harness asks of `generate`, in the words of transformers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from transformers import GenerationConfig

MAX_NEW_TOKENS = 1024
"""Where a task names no limit, as in the harness's own LLaVA."""
_SAMPLING = ("temperature", "top_p", "top_k")
_OWN_NAMES = ("until", "stop_sequences", "max_gen_toks", "max_new_tokens", "do_sample")


@dataclass(frozen=True)
class Generation:
    """Options of `generate`, and the texts at which an answer ends."""

    options: Mapping[str, Any]
    until: tuple[str, ...] = ()

    def shorten(self, text: str) -> str:
        """The answer up to the first of the texts that end it."""
        ends = [place for end in self.until if (place := text.find(end)) >= 0]
        return text[: min(ends, default=len(text))].strip()


def generation_of(asked: Mapping[str, Any]) -> Generation:
    """Greedy where the temperature is 0 or not given, as everywhere in the harness.

    Raises:
        ValueError: a limit or a list of endings that is none.
    """
    options: dict[str, Any] = {
        "max_new_tokens": _limit(
            asked.get("max_new_tokens") or asked.get("max_gen_toks") or MAX_NEW_TOKENS
        ),
        "num_beams": int(asked.get("num_beams") or 1),
    }
    rest = {name: value for name, value in asked.items() if name not in (*_OWN_NAMES, "num_beams")}
    known = {name: value for name, value in rest.items() if value is not None and _is_known(name)}
    temperature = asked.get("temperature")
    samples = asked.get("do_sample", bool(temperature)) and temperature != 0
    options["do_sample"] = bool(samples)
    options |= {name: value for name, value in known.items() if samples or name not in _SAMPLING}
    for name in sorted(set(rest) - set(known)):
        if rest[name] is not None:
            _warn_once(name)
    return Generation(options, _endings(asked.get("until") or asked.get("stop_sequences") or ()))


def same_generation(asked: Mapping[str, Any]) -> str:
    """Equal for requests that can be answered in one call of `generate`."""
    return json.dumps(dict(asked), sort_keys=True, default=str)


def _is_known(name: str) -> bool:
    return hasattr(_defaults(), name)


@cache
def _defaults() -> GenerationConfig:
    return GenerationConfig()


@cache
def _warn_once(name: str) -> None:
    warnings.warn(
        f"the task asks for {name!r}, which generate() of transformers does not know; it is left out",
        stacklevel=2,
    )


def _limit(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise ValueError(f"max_new_tokens must be a whole number above 0, got {value!r}")
    return int(value)


def _endings(until: Any) -> tuple[str, ...]:
    endings = [until] if isinstance(until, str) else until
    if not isinstance(endings, (list, tuple)) or not all(isinstance(end, str) for end in endings):
        raise ValueError(f"until must be a text or a list of texts, got {until!r}")
    return tuple(end for end in endings if end)
