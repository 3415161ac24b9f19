"""How far the answers of a pruned model agree with the plain model's: no labels are needed.

The plain model answers greedily, once. A pruned model is then asked to go along its answer, token by token, by
the same `generate`. Where each of its own choices is the plain model's, its greedy answer is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..evaluation.batches import Batch
from ..methods.base import Method

SHORT = 8
"""Tokens, the end of the answer included, up to which an answer counts as a whole or not at all."""
LIKELY = 64
"""The tokens of a distribution that are compared one by one, the most likely ones; the rest is one more."""
_LEAST = -50.0  # a logarithm below which a probability is nothing


@dataclass(frozen=True)
class Answers:
    """The plain model's greedy answers to a batch, B prompts of T tokens at most.

    tokens: int64 [B, T]; what lies behind an answer is of no account. lengths: int64 [B], the end of the
    answer included. likely: int64 [B, T, K], the most likely tokens; logs: float32 [B, T, K], the logarithms
    of their probabilities.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    likely: torch.Tensor
    logs: torch.Tensor

    def arrays(self) -> dict[str, NDArray[Any]]:
        """As numpy has them, by name."""
        return {name: value.numpy() for name, value in vars(self).items()}

    @classmethod
    def of_arrays(cls, arrays: dict[str, NDArray[Any]]) -> Answers:
        return cls(**{name: torch.from_numpy(value) for name, value in arrays.items()})


@dataclass(frozen=True)
class Scores:
    """One method on some prompts; float arrays [prompts].

    agreement: 1 where a short answer is the plain model's, else 0; of a longer one the share of tokens.
    divergence: KL of the tokens' distributions from the plain model's, mean over the answer, nats.
    entering: mean visual tokens entering a layer. flops_share: of the plain decoder's prefill.
    milliseconds: until the first token, without the vision tower where its features are kept.
    """

    agreement: NDArray[np.float64]
    divergence: NDArray[np.float64]
    entering: NDArray[np.float64]
    flops_share: NDArray[np.float64]
    milliseconds: NDArray[np.float64]

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        names = cls.__dataclass_fields__
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    @property
    def value(self) -> float:
        """What a search maximises: agreement, and between equal ones less divergence.

        The divergence counts less than half of one short answer.
        """
        divergence = self.divergence.mean()
        tie = divergence / (1 + divergence) / (2 * len(self.agreement))
        return float(self.agreement.mean() - tie)


@torch.inference_mode()
def plain_answers(model: Any, batch: Batch, new_tokens: int) -> Answers:
    """The greedy answers of the model as it is, with `new_tokens` at most."""
    seen = _Likely()
    inputs = batch.inputs()
    ids = _generate(model, inputs, new_tokens, seen)
    tokens = ids[:, inputs["input_ids"].shape[1] :]
    likely, logs = (torch.stack(steps, 1).cpu() for steps in (seen.likely, seen.logs))
    return Answers(tokens.cpu(), _lengths(tokens, _ends(model)).cpu(), likely, logs)


@torch.inference_mode()
def scores(model: Any, method: Method, batch: Batch, answers: Answers) -> Scores:
    """How far `method` agrees with the plain answers, in the order of the batch's tasks.

    Raises:
        ValueError, UnsupportedError: the method cannot run on this model, or its budget is infeasible.
    """
    # A tower that merges has to run anew.
    inputs = batch.pixels() if method.tower().merge else batch.inputs()
    beside = _Beside(answers, model.device)
    start = time.perf_counter()
    with method(model) as trace:
        _generate(model, inputs, answers.tokens.shape[1], beside)
    agreement, divergence = beside.results()
    milliseconds = 1000 * (beside.first - start) / len(batch.tasks)
    samples = trace.samples
    return Scores(
        agreement,
        divergence,
        np.array([sample.mean_tokens for sample in samples], float),
        np.array([sample.flops / sample.flops_full for sample in samples], float),
        np.full(len(samples), milliseconds),
    )


def agreement(same: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The agreement of each answer, float64 [B].

    Args:
        same: bool [B, T], whether a token is the one that would have been chosen.
        lengths: int64 [B].
    """
    inside = torch.arange(same.shape[1], device=same.device) < lengths[:, None]
    share = (same & inside).sum(1) / lengths.double()
    return torch.where(lengths <= SHORT, (share == 1).double(), share)


def divergence(likely: torch.Tensor, logs: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(plain, other) in nats, where tokens that are not likely count as one: float [B].

    Never more than that of the whole distributions.

    Args:
        likely, logs: [B, K], as in `Answers`, of one token.
        other: float [B, vocabulary], logarithms of probabilities.
    """
    mine, theirs = logs.clamp(min=_LEAST), other.gather(1, likely).clamp(min=_LEAST)
    inside = (mine.exp() * (mine - theirs)).sum(1)
    rest = (1 - mine.exp().sum(1)).clamp(min=0)
    other_rest = (1 - theirs.exp().sum(1)).clamp(min=float(np.exp(_LEAST)))
    apart = inside + torch.xlogy(rest, rest) - rest * other_rest.log()
    return apart.nan_to_num(nan=-_LEAST).clamp(min=0)


class _Likely:
    """Notes what the plain model finds likely for each token; a `LogitsProcessor` that changes nothing."""

    def __init__(self) -> None:
        self.likely: list[torch.Tensor] = []
        self.logs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        top = logits.float().log_softmax(-1).topk(min(LIKELY, logits.shape[-1]))
        self.likely.append(top.indices)
        self.logs.append(top.values)
        return logits


class _Beside:
    """Compares each token with the plain answer's, then goes on with that one; a `LogitsProcessor`."""

    def __init__(self, answers: Answers, device: torch.device) -> None:
        self._answers = Answers(*(value.to(device) for value in vars(answers).values()))
        self._same: list[torch.Tensor] = []
        self._divergence: list[torch.Tensor] = []
        self.first = 0.0

    def __call__(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        known, token = self._answers, len(self._same)
        logs = logits.float().log_softmax(-1)
        self._same.append(logits.argmax(-1) == known.tokens[:, token])
        self._divergence.append(divergence(known.likely[:, token], known.logs[:, token], logs))
        if not token:
            # It waits for the device, so the prefill is over.
            self._divergence[0].sum().item()
            self.first = time.perf_counter()
        forced = torch.full_like(logits, float("-inf"))
        return forced.scatter_(1, known.tokens[:, token, None], 0.0)

    def results(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Agreement and mean divergence of every answer."""
        lengths = self._answers.lengths
        same, apart = torch.stack(self._same, 1), torch.stack(self._divergence, 1).double()
        inside = torch.arange(same.shape[1], device=same.device) < lengths[:, None]
        mean = apart.where(inside, 0).sum(1) / lengths
        return agreement(same, lengths).cpu().numpy(), mean.cpu().numpy()


def _generate(model: Any, inputs: Any, new_tokens: int, processor: Callable[..., Any]) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        logits_processor=[processor],
    )


def _ends(model: Any) -> list[int]:
    """The tokens that end an answer."""
    end = model.generation_config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def _lengths(tokens: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
    """Tokens of each answer up to its end, int64 [B]."""
    ended = torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype, device=tokens.device))
    first = ended.int().argmax(1) + 1
    return torch.where(ended.any(1), first, tokens.shape[1])
