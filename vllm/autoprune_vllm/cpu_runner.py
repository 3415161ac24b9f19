"""A part of vLLM's loading that its runner for the CPU leaves out."""

from __future__ import annotations

from typing import Any


def mend_cpu_runner() -> None:
    """Have vLLM's runner for the CPU ask pruned models for positions, as its runner for GPUs does.

    `GPUModelRunner.load_model` sets `is_multimodal_pruning_enabled`, and `CPUModelRunner.load_model` in vLLM
    0.32 does not. Nothing changes for models that are not the plugin's.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load_model = CPUModelRunner.load_model
    if getattr(load_model, "mended", False):
        return

    def load_and_ask(runner: Any, *args: Any, **options: Any) -> None:
        load_model(runner, *args, **options)
        if getattr(runner.get_model(), "keeps_positions", False):
            runner.is_multimodal_pruning_enabled = True

    load_and_ask.mended = True  # type: ignore[attr-defined]
    CPUModelRunner.load_model = load_and_ask
