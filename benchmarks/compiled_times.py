"""Time of a single prompt's prefill on a GPU: plain, pruned, and with compiled layers.

    python benchmarks/compiled_times.py

Medians of 7 runs by the wall clock, one setting behind the other, the plain model first and last.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from autoprune import AutoPrune
from autoprune.bench.subjects import build

EVERYTHING = 10**6
SETTINGS: dict[str, tuple[AutoPrune, bool]] = {
    "pruned": (AutoPrune(64), False),
    "nothing pruned, compiled": (AutoPrune(EVERYTHING), True),
    "pruned, compiled": (AutoPrune(64), True),
    "cut_every=8, compiled": (AutoPrune(64, cut_every=8), True),
}


def milliseconds(run: Callable[[], Any]) -> float:
    """The median of 7 runs, behind 2 that are not counted."""
    times = []
    for _ in range(9):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def main() -> None:
    """Print each setting's time."""
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA GPU; compiled_prefill.py counts kernels without one")
    subject = build("llava-1.5-7b", 64, 1, torch.device("cuda"), torch.bfloat16)
    inputs = subject.prompts(1)

    def prefill() -> None:
        with torch.inference_mode():
            subject.model(**inputs, use_cache=True, logits_to_keep=1)

    print(torch.cuda.get_device_name(), torch.__version__, transformers.__version__)
    print(f"{'plain':26}{milliseconds(prefill):6.1f} ms")
    for name, (method, compiled) in SETTINGS.items():
        handle = method.attach(subject.model)
        if compiled:
            handle.compile_prefill()
        print(f"{name:26}{milliseconds(prefill):6.1f} ms", flush=True)
        handle.detach()
    print(f"{'plain':26}{milliseconds(prefill):6.1f} ms")


if __name__ == "__main__":
    main()
