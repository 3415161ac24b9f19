"""What was measured, beside what the FLOPs promise; one row per variant and batch size."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import date
from math import comb
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..trace import Sample
from .clock import Clock
from .measure import Launched
from .policy import policy_seconds
from .session import Measured
from .subjects import Subject

Row = dict[str, Any]


def rows(measured: Sequence[Measured]) -> list[Row]:
    """One row per variant; those that have not been timed yet are left out."""
    plain: dict[int, Measured] = {}
    for own in measured:
        plain.setdefault(own.batch, own)
    return [_row(plain[own.batch], own) for own in measured if own.seconds["prefill"]]


def describe(subject: Subject, clock: Clock) -> dict[str, Any]:
    """The model, the machine and the versions behind the figures."""
    import torch
    import transformers

    from .. import __version__

    decoder = subject.model.get_decoder().config
    return {
        "date": date.today().isoformat(),
        "model": {
            "name": subject.name,
            "type": subject.model.config.model_type,
            "layers": decoder.num_hidden_layers,
            "hidden_size": decoder.hidden_size,
            "attention": decoder._attn_implementation,
            "dtype": str(subject.model.dtype).removeprefix("torch."),
        },
        "machine": _machine(clock),
        "versions": {
            "autoprune": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def policy() -> dict[str, float]:
    """Seconds of AutoPrune's planning for one prompt and for a batch of 64."""
    return {"one_prompt": policy_seconds(1), "batch_of_64": policy_seconds(64)}


def padding_waste(samples: Sequence[Sample]) -> float:
    """What padding every layer to the batch's longest prompt would add, as a share of the real tokens:
    `sum_l batch * max_i n_il / sum_l sum_i n_il - 1`, text included.

    Layers where it is much run packed and compute none of it; the cache holds all of it.
    """
    counts = np.array([[n + s.num_text for n in s.tokens_per_layer] for s in samples])
    return float(len(counts) * counts.max(axis=0).sum() / counts.sum() - 1)


def _row(plain: Measured, own: Measured) -> Row:
    """Ratios are those of the same round: the plain model's time over the variant's."""
    samples, method = own.held.samples, own.variant.method
    row: Row = {
        "batch": own.batch,
        "variant": own.variant.label,
        "kind": own.variant.kind,
        "seconds": {phase: _spread(taken) for phase, taken in own.seconds.items()},
        "speedup": {
            phase: _spread(_ratios(plain.seconds[phase], taken))
            for phase, taken in own.seconds.items()
        },
        "peak_bytes": own.held.peak,
        "peak_bytes_plain": plain.held.peak,
        "kv_bytes_held": own.held.kv,
        "kv_bytes_held_plain": plain.held.kv,
        **_launches(plain.launched, own.launched),
    }
    if own.variant.of is not None:
        row["of"] = own.variant.of
    if method is None:
        return row
    ideal = sum(s.flops_full for s in samples) / sum(s.total_flops for s in samples)
    if own.floor:
        floor = _ratios(plain.seconds["prefill"], own.floor)
        added = [
            taken - alone for taken, alone in zip(own.seconds["prefill"], own.floor, strict=False)
        ]
        row |= {
            "floor_seconds": _spread(own.floor),
            "floor_share": median(floor) / ideal,
            "added_seconds": _spread(added),
        }
    return row | {
        "budget": str(method.budget),
        "visual_tokens": float(np.mean([s.num_visual for s in samples])),
        "mean_tokens": float(np.mean([s.mean_tokens for s in samples])),
        "text_tokens": samples[0].num_text,
        "tokens_per_layer": [s.tokens_per_layer for s in samples],
        "mutual_information": [s.mutual_information for s in samples],
        "flops": sum(s.total_flops for s in samples),
        "flops_full": sum(s.flops_full for s in samples),
        "ideal_speedup": ideal,
        "realised_share": row["speedup"]["prefill"]["median"] / ideal,
        "kv_bytes": sum(s.kv_bytes for s in samples),
        "kv_bytes_trace": sum(s.kv_bytes_held for s in samples),
        "peak_bytes_trace": sum(s.peak_bytes for s in samples),
        "padding_waste": padding_waste(samples),
    }


def _launches(plain: Launched | None, own: Launched | None) -> Row:
    """Kernels of the decoder's prefill; what pruning adds around it counts as the decoder's."""
    if plain is None or own is None:
        return {}
    launches = plain.decoder + own.total - plain.total
    return {
        "launches": launches,
        "launches_ratio": launches / plain.decoder,
        "copies": own.copies,
    }


def _ratios(plain: Sequence[float], own: Sequence[float]) -> list[float]:
    """Rounds that were interrupted have no partner."""
    return [before / after for before, after in zip(plain, own, strict=False)]


def _spread(values: Sequence[float]) -> dict[str, Any]:
    low, middle, high = np.percentile(values, [25, 50, 75])
    interval = median_interval(values)
    return {"median": middle, "q1": low, "q3": high, "interval": interval, "all": list(values)}


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Bounds of at least 95 % confidence for the median that more rounds would come to.

    Two of the values, by the sign test: each lies on either side of the median as a coin falls. None for
    fewer than six.
    """
    ordered, count, rank = sorted(values), len(values), 0
    tail = 1  # coins of which at most `rank` fall on one side, of 2 ** count
    while 40 * tail <= 2**count:
        rank += 1
        tail += comb(count, rank)
    return (ordered[rank - 1], ordered[count - rank]) if rank else None


def _machine(clock: Clock) -> dict[str, Any]:
    import torch

    machine = {"device": str(clock.device), "clock": clock.name, "cpu": _cpu()}
    if clock.on_gpu:
        return machine | {"gpu": torch.cuda.get_device_name(clock.device)}
    return machine | {"threads": torch.get_num_threads()}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
