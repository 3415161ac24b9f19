"""Ask the questions of one setting, and write down each answer with what it cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..errors import UnsupportedError
from ..methods.base import Method
from ..trace import Sample
from .batches import Batch
from .settings import Setting
from .tasks import Task, is_right


class Refused(Exception):
    """A setting that this model or these prompts do not allow; the message says why."""


def answers(
    model: Any, processor: Any, setting: Setting, batches: Sequence[Batch], max_new_tokens: int
) -> Iterator[list[dict[str, Any]]]:
    """The records of each batch, greedily answered, in the order of its tasks.

    Raises:
        Refused: the method cannot run on this model, or its budget is infeasible for a prompt.
    """
    method = setting.method
    if method is None:
        raise Refused(setting.refusal)
    try:
        method(model)
    except (ValueError, UnsupportedError) as error:
        raise Refused(str(error)) from error
    for batch in batches:
        # A tower that merges has to run anew for each budget.
        inputs = batch.pixels() if method.tower().merge else batch.inputs()
        try:
            texts, samples = generate(model, processor, method, inputs, max_new_tokens)
        except (ValueError, UnsupportedError) as error:
            raise Refused(str(error)) from error
        yield [
            _record(task, text.strip(), sample)
            for task, text, sample in zip(batch.tasks, texts, samples, strict=True)
        ]


@torch.inference_mode()
def generate(
    model: Any, processor: Any, method: Method, inputs: Any, max_new_tokens: int
) -> tuple[list[str], list[Sample]]:
    """The greedy answer to each prompt of a batch, and what it cost.

    Raises:
        ValueError: the budget is infeasible for a prompt.
        UnsupportedError: the method cannot run on this model.
    """
    with method(model) as trace:
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = ids[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new, skip_special_tokens=True), trace.samples


def _record(task: Task, prediction: str, sample: Sample) -> dict[str, Any]:
    return {
        "id": task.id,
        "kind": task.kind,
        "prediction": prediction,
        "correct": is_right(prediction, task.answers),
        "entering": sample.mean_tokens,
        "flops": sample.total_flops,
        "kv_bytes": sample.kv_bytes,
        "mutual_information": sample.mutual_information,
    }
