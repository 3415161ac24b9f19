"""One batch of requests through `model.generate`: each row has its own method, sampling, stops and end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria

from ..engine.cache.argument import as_argument
from ..loading import Loaded
from ..methods.per_prompt import per_prompt
from ..trace import Sample
from .collate import collate, to_device
from .conversations import Kept
from .errors import RequestError
from .job import Finished, Job, Piece
from .text_stream import TextStream

log = logging.getLogger(__name__)


class Row:
    """One row of a batch: a job with what was generated for it.

    Attributes:
        sent: whether its client was told anything.
        done: whether its answer has ended.
    """

    def __init__(self, job: Job, tokenizer: Any, batch_size: int) -> None:
        self.job, self._tokenizer, self._batch_size = job, tokenizer, batch_size
        self._text = TextStream(tokenizer, job.request.stop)
        self._logprobs: list[dict[str, Any]] = []
        self._generator: torch.Generator | None = None
        self.tokens = 0
        self.done = self.sent = False

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """The scores [vocabulary] after which the likeliest token is the one that was drawn.

        The row draws by itself, so that it gets the same tokens in every batch.
        """
        if self.done:
            return scores
        logprobs = self.job.request.logprobs
        known = None if logprobs is None else scores.log_softmax(-1)
        sampling = self.job.request.sampling
        if sampling.temperature > 0:
            # Below the best one, so that no division overflows; float32 has nothing much smaller.
            below = (scores - scores.max()) / max(sampling.temperature, 1e-30)
            token = self._drawn(below, sampling.top_p)
            scores = torch.full_like(scores, -torch.inf)
            scores[token] = 0
        if known is not None:
            self._note_logprobs(known, int(scores.argmax()))
        return scores

    def _drawn(self, scores: torch.Tensor, top_p: float) -> int:
        """A token, of the likeliest ones whose probabilities reach `top_p` together."""
        if self._generator is None:
            self._generator = torch.Generator(scores.device)
            self._generator.manual_seed(self.job.seed)
        shares, tokens = scores.softmax(-1).sort(descending=True)
        shares = shares.where(shares.cumsum(-1) - shares < top_p, 0)
        return int(tokens[torch.multinomial(shares, 1, generator=self._generator)])

    def _note_logprobs(self, known: torch.Tensor, chosen: int) -> None:
        top = known.topk(self.job.request.logprobs or 0)
        listed = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        self._logprobs.append(
            {
                **self._logprob(chosen, float(known[chosen])),
                "top_logprobs": [self._logprob(*entry) for entry in listed],
            }
        )

    def _logprob(self, token: int, logprob: float) -> dict[str, Any]:
        text = str(self._tokenizer.decode([token]))
        # JSON has no infinity; OpenAI's servers write this number for what cannot come.
        return {
            "token": text,
            "logprob": max(logprob, -9999.0),
            "bytes": list(text.encode("utf-8", "replace")),
        }

    def accept(self, token: int, ends: frozenset[int], sample: Callable[[], Sample]) -> bool:
        """Take a further token; returns whether the answer has ended.

        Args:
            ends: tokens that end an answer.
            sample: gives what the prompt cost.
        """
        if self.done:
            return True
        if self.job.cancelled:
            self.done = True
            return True
        if self.job.first_token is None:
            self.job.first_token = time.monotonic()
        self.tokens += 1
        text = "" if token in ends else self._text.push(token)
        stopped = token in ends or self._text.stopped
        self.done = stopped or self.tokens >= self.job.max_tokens
        if self.done:
            text += self._text.finish()
        if text or (self._logprobs and self.done):
            self._tell(Piece(text, self._logprobs))
            self._logprobs = []
        if self.done:
            reason = "stop" if stopped or self._text.stopped else "length"
            self._tell(Finished(reason, self.tokens, sample(), self._batch_size))
        return self.done

    def fail(self, error: RequestError) -> None:
        """End the answer with an error."""
        if not self.done:
            self.done = True
            self._tell(error)

    def _tell(self, event: Piece | Finished | RequestError) -> None:
        self.sent = True
        self.job.tell(event)


class ChooseTokens(LogitsProcessor):
    """Lets every row choose its token, behind the processors of the model's own settings."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.stack([row.choose(s) for row, s in zip(self._rows, scores, strict=True)])


class EndRows(StoppingCriteria):
    """Hands each row its token, and ends the rows whose answer has ended or whose client has left."""

    def __init__(
        self, rows: Sequence[Row], ends: frozenset[int], samples: Callable[[], Sequence[Sample]]
    ) -> None:
        self._rows, self._ends, self._samples = rows, ends, samples

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = [self._accept(at, token) for at, token in enumerate(input_ids[:, -1].tolist())]
        return torch.tensor(done, device=input_ids.device)

    def _accept(self, at: int, token: int) -> bool:
        row = self._rows[at]
        try:
            return row.accept(token, self._ends, lambda: self._samples()[at])
        except Exception:  # what one answer cannot be made of must not end the others
            log.exception("an answer could not be written")
            row.fail(RequestError("the answer could not be written; the server goes on", 500))
            return True


def end_tokens(model: Any) -> frozenset[int]:
    """Tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return frozenset(() if ends is None else [ends] if isinstance(ends, int) else ends)


def pad_token(loaded: Loaded) -> int:
    """What fills up shorter prompts; the attention mask hides it."""
    tokenizer = getattr(loaded.processor, "tokenizer", loaded.processor)
    pad = getattr(tokenizer, "pad_token_id", None)
    return pad if pad is not None else next(iter(end_tokens(loaded.model)), 0)


@torch.inference_mode()
def generate(
    loaded: Loaded, rows: Sequence[Row], cache: Any = None, kept: Kept | None = None
) -> tuple[torch.Tensor, Sequence[Sample]]:
    """Answer a batch; every job is told its answer as it grows.

    Args:
        cache: to use instead of a new one; of `kept`, if there is one.
        kept: what the only job goes on with.

    Returns:
        Prompts and answers, LongTensor [batch, length], and what each prompt cost.

    Raises:
        Exception: whatever the model, or a method, raises. Rows that are not done were told no end.
    """
    model, jobs = loaded.model, [row.job for row in rows]
    inputs: dict[str, Any] = collate([job.prompt for job in jobs], pad_token(loaded))
    if kept is not None:
        # The cache has the pictures.
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    inputs = to_device(inputs, model)
    if cache is not None:
        inputs |= as_argument(model, cache)
    chooses = any(
        job.request.sampling.temperature > 0 or job.request.logprobs is not None for job in jobs
    )
    with per_prompt([job.method for job in jobs])(model) as trace:

        def samples() -> Sequence[Sample]:
            return trace.samples if kept is None else [kept.sample]

        ids = model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max(job.max_tokens for job in jobs),
            logits_processor=[ChooseTokens(rows)] if chooses else None,
            stopping_criteria=[EndRows(rows, end_tokens(model), samples)],
        )
        return ids, samples()
