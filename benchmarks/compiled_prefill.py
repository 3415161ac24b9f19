"""How many kernels a prefill launches when its decoder layers are compiled: plain, pruned, pruned and compiled.

Counted on a CPU, as in `launches.py`. The kernels that inductor generates are counted in the code that it
writes for a graph, and added each time the graph runs; what it leaves to libraries is seen as it runs.

    python benchmarks/compiled_prefill.py

Needs a C++ compiler. Compiling takes about a minute on one core.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
import transformers
from launches import LAYERS, PATCHES, GivenInformation, build
from launches import prompts as prompts_of
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.graph import GraphLowering

from autoprune.bench.launches import Launches, decoder_only, kernels
from autoprune.methods.base import Method

# The call of a kernel, in code that inductor wrote.
KERNEL = re.compile(r"^\s+(?:cpp|triton)_\w+(?:\.run)?\(", re.MULTILINE)


class WithCompiled(Launches):
    """Counts launches of compiled graphs, too."""

    now: WithCompiled | None = None

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Otherwise nothing would run compiled while this counts."""
        return True

    def __enter__(self) -> WithCompiled:
        WithCompiled.now = self
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        WithCompiled.now = None
        super().__exit__(*exception)


def inductor(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """The compiler, which counts the kernels of its own that the graph runs."""
    written: list[str] = []
    without_caches = inductor_config.patch(fx_graph_cache=False)
    with without_caches, patch.object(GraphLowering, "save_output_code", written.append):
        run = compile_fx(graph, inputs)
    own = sum(len(KERNEL.findall(code)) for code in written)

    def counted(*args: Any) -> Any:
        if WithCompiled.now is not None:
            WithCompiled.now.seen["generated"] += own
        return run(*args)

    return counted


@torch.inference_mode()
def count(
    model: Any, inputs: dict[str, torch.Tensor], method: Method | None, compiled: bool = False
) -> tuple[int, int]:
    """Launches of a prefill: all of them, and the decoder's with its hooks."""
    with ExitStack() as stack:
        if method is not None:
            handle = method(model)
            if compiled:
                handle.compile_prefill(inductor)
            stack.enter_context(handle)
        model(**inputs, logits_to_keep=1)  # compiles, and makes what is made once per model
        with WithCompiled() as launches, decoder_only(model, launches) as decoder:
            model(**inputs, logits_to_keep=1)
    return launches.total, kernels(decoder)


CASES = {
    "batch 1, 64 of 576": (1, 1, 64),
    "batch 1, 320 of 2880": (1, 5, 320),
    "ragged batch of 8, 64 of 576": (8, 1, 64),
}


def main() -> None:
    model = build()
    layer = model.get_decoder().layers[0]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(f"{LAYERS} {type(layer).__name__}, bfloat16, {platform.machine()} CPU, {versions}")
    for name, (batch, images, budget) in CASES.items():
        inputs = prompts_of(batch, images)
        plain, decoder = count(model, inputs, None)
        print(f"{name}: plain decoder {decoder}")
        methods = {
            "whole, compiled": (GivenInformation(images * PATCHES), True),
            "pruned": (GivenInformation(budget), False),
            "pruned, compiled": (GivenInformation(budget), True),
            "ranked at every cut": (GivenInformation(budget, rank_every=1), False),
            "ranked at every cut, compiled": (GivenInformation(budget, rank_every=1), True),
        }
        for what, (method, compiled) in methods.items():
            launches = decoder + count(model, inputs, method, compiled)[0] - plain
            print(f"  {what}: {launches}, {launches / decoder:.2f} of plain", flush=True)


if __name__ == "__main__":
    main()
