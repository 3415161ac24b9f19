"""One prefill and a few greedy steps: how long they take, how much memory they hold, what they launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from ..engine.cache.argument import as_argument, cache_of
from ..methods.base import Method
from ..trace import Sample
from .clock import Clock
from .floor import LayersAlone
from .launches import Launches, decoder_only, kernels
from .memory import PeakMemory, cache_bytes
from .subjects import Tensors

PHASES = ("vision", "prefill", "ttft", "decode")
"""Seconds from the call to the decoder's entry, from there to the first token's logits, both, and
of one greedy step."""


@dataclass(frozen=True)
class Held:
    """Memory of one prefill: peak of allocations, bytes the cache holds, and the trace."""

    peak: int
    kv: int
    samples: list[Sample]


@dataclass(frozen=True)
class Launched:
    """What one prefill launches.

    total: kernels from the call to the first token's logits. decoder: those inside of the decoder.
    copies: from the host to the device.
    """

    total: int
    decoder: int
    copies: int


@torch.inference_mode()
def time_once(
    model: Any,
    prompts: Tensors,
    method: Method | LayersAlone | None,
    steps: int,
    clock: Clock,
) -> dict[str, float]:
    """Seconds of each of `PHASES`, decoding only if there are steps; attaching is not timed."""
    entered: list[Any] = []
    with _pruned(model, method), _at_decoder(model, lambda: entered.append(clock.mark())):
        clock.settle()
        start = clock.mark()
        output = model(**prompts, use_cache=True, logits_to_keep=1)
        decoded = [clock.mark()]
        for _ in range(steps):
            token = output.logits[:, -1:].argmax(dim=-1)
            cache = as_argument(model, cache_of(output))
            output = model(input_ids=token, use_cache=True, **cache)
            decoded.append(clock.mark())
        vision, prefill = clock.seconds([start, entered[0], decoded[0]])
        times = {"vision": vision, "prefill": prefill, "ttft": vision + prefill}
        return times | ({"decode": median(clock.seconds(decoded))} if steps else {})


@torch.inference_mode()
def hold_once(model: Any, prompts: Tensors, method: Method | None) -> Held:
    """Memory of the decoder's prefill, from its entry to the first token's logits.

    A step of decoding follows, so that the first one to be timed is not the first of all.
    """
    with (
        PeakMemory(model.device) as memory,
        _pruned(model, method) as trace,
        _at_decoder(model, memory.start),
    ):
        output = model(**prompts, use_cache=True, logits_to_keep=1)
        peak = memory.stop()
        samples = trace.samples if trace is not None else []
        cache = cache_of(output)
        held = Held(peak, cache_bytes(cache), samples)
        token = output.logits[:, -1:].argmax(dim=-1)
        model(input_ids=token, use_cache=True, **as_argument(model, cache))
        return held


@torch.inference_mode()
def count_once(model: Any, prompts: Tensors, method: Method | None) -> Launched | None:
    """What a prefill launches; one before it has made what is made once.

    None with flex attention: its kernel is compiled, and operations cannot be counted meanwhile.
    """
    if model.get_decoder().config._attn_implementation == "flex_attention":
        return None
    with (
        _pruned(model, method),
        Launches() as launches,
        decoder_only(model, launches) as decoder,
    ):
        model(**prompts, use_cache=True, logits_to_keep=1)
    return Launched(launches.total, kernels(decoder), launches.copies)


def _pruned(model: Any, method: Method | LayersAlone | None) -> Any:
    return nullcontext() if method is None else method(model)


@contextmanager
def _at_decoder(model: Any, action: Callable[[], object]) -> Iterator[None]:
    """Do something when the decoder is first entered, before the hooks of a method."""
    waiting = [action]

    def enter(*_: Any) -> None:
        if waiting:
            waiting.pop()()

    handle = model.get_decoder().register_forward_pre_hook(enter, prepend=True)
    try:
        yield
    finally:
        handle.remove()
