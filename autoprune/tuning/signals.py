"""What a method that shares its budget is told of prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ..evaluation.batches import Batch
from ..methods.autoprune import AutoPrune
from ..policy.fleet import Fleet
from ..policy.rules import Floats, InformationRule, Signals


class _Recorder:
    """A rule that notes what it is told, and gives every prompt what it gets alone."""

    def __init__(self) -> None:
        self.seen: list[Signals] = []

    def __call__(self, signals: Sequence[Signals], tokens: Floats) -> Floats:
        self.seen += signals
        return InformationRule(0)(signals, tokens)


@torch.inference_mode()
def signals(model: Any, method: AutoPrune, batch: Batch) -> list[Signals]:
    """The signals of a batch's prompts, each with a picture, in the order of its tasks.

    Args:
        method: with the budget of each prompt.
    """
    # A stream asks its rule about every prompt, a batch of one prompt does not.
    recorder = _Recorder()
    budget = dataclasses.replace(method.budget, over="stream")
    with dataclasses.replace(method, budget=budget, fleet=Fleet(recorder))(model):
        model.generate(**batch.inputs(), max_new_tokens=1, do_sample=False, num_beams=1)
    return recorder.seen
