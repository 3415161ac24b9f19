"""Answers in OpenAI's JSON: whole ones, and the chunks of streamed ones."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from ..policy.budget import Budget
from .job import Finished, Job, Piece


@dataclass(frozen=True)
class Answer:
    """What all chunks of one answer share.

    Args:
        job: what is answered.
        model: the name under which the model is served.
    """

    job: Job
    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, pieces: list[Piece], finished: Finished) -> dict[str, Any]:
        """The answer in one."""
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces)}
        logprobs = [entry for piece in pieces for entry in piece.logprobs]
        choice = self._choice("message", message, logprobs, finished.reason)
        return {
            **self._envelope("chat.completion"),
            "choices": [choice],
            "usage": self.usage(finished),
        }

    def begin(self) -> dict[str, Any]:
        """The first chunk."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, piece: Piece) -> dict[str, Any]:
        """A chunk with text."""
        return self._chunk({"content": piece.text}, piece.logprobs)

    def end(self, finished: Finished) -> list[dict[str, Any]]:
        """The last chunks: why the answer ended, and what it cost where that is wanted."""
        chunks = [self._chunk({}, reason=finished.reason)]
        if self.job.request.usage_in_stream:
            usage = {"choices": [], "usage": self.usage(finished)}
            chunks.append({**self._envelope("chat.completion.chunk"), **usage})
        return chunks

    def usage(self, finished: Finished) -> dict[str, Any]:
        """Tokens, and under `autoprune` what pruning spent."""
        prompt = self.job.prompt.length
        return {
            "prompt_tokens": prompt,
            "completion_tokens": finished.tokens,
            "total_tokens": prompt + finished.tokens,
            "prompt_tokens_details": {"cached_tokens": self.job.cached_tokens},
            "autoprune": self._pruning(finished),
        }

    def _pruning(self, finished: Finished) -> dict[str, Any]:
        sample, method = finished.sample, self.job.method
        told: dict[str, Any] = {
            "method": self.job.method_name,
            "budget": budget_record(method.budget),
            "visual_tokens": sample.num_visual,
            "visual_tokens_per_layer": sample.mean_tokens,
            "flops_share": _share(sample.total_flops, sample.flops_full),
            "kv_share": _share(sample.kv_bytes, sample.kv_bytes_full),
        }
        if self.job.request.pruning.details:
            told |= {
                "information_bits": sample.mutual_information,
                "schedule": sample.tokens_per_layer,
                "flops": sample.total_flops,
                "flops_unpruned": sample.flops_full,
                "kv_bytes": sample.kv_bytes,
                "kv_bytes_unpruned": sample.kv_bytes_full,
                "batch_size": finished.batch_size,
            }
        return told

    def _chunk(
        self, delta: dict[str, Any], logprobs: Any = (), reason: str | None = None
    ) -> dict[str, Any]:
        choice = self._choice("delta", delta, list(logprobs), reason)
        chunk = {**self._envelope("chat.completion.chunk"), "choices": [choice]}
        if self.job.request.usage_in_stream:
            chunk["usage"] = None
        return chunk

    def _choice(
        self, name: str, content: Any, logprobs: list[Any], reason: str | None
    ) -> dict[str, Any]:
        asked = self.job.request.logprobs is not None and (name == "message" or logprobs)
        told = {"content": logprobs, "refusal": None} if asked else None
        return {"index": 0, name: content, "logprobs": told, "finish_reason": reason}

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def budget_record(budget: Budget) -> dict[str, Any]:
    """A budget as requests state it, with how its tokens are counted where that is not the usual way."""
    record: dict[str, Any] = {"budget" if budget.kind == "tokens" else budget.kind: budget.value}
    return record if budget.counted == "entering" else {**record, "counted": budget.counted}


def _share(spent: float, full: float) -> float:
    return round(spent / full, 6) if full else 1.0
