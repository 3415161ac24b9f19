"""The classes that lmms-eval runs: any model that this library loads, pruned by any of its methods."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from ...loading import Loaded, load_embedded, load_model
from ...trace import Sample
from ..prompts import Conversation, can_pad, encode, prompt_text, takes_videos
from .conversations import MAX_FRAMES, conversation_of, of_visuals
from .costs import CostFile, cost_of, cost_of_rounds, summary_of
from .generation import Generation, generation_of
from .likelihood import answer_tokens, likelihoods
from .requests import Asked, in_batches
from .settings import EMBEDDED, method_of


class AutoPruneChat(lmms):
    """`lmms-eval --model autoprune --model_args pretrained=...,method=autoprune,budget=64`.

    Args:
        pretrained: a checkpoint's folder or hub name; default: the embedded model.
        method: as `autoprune methods` lists it, a file of `autoprune tune`, or full for the unpruned model.
        budget: 64, 1/9, 11%; default: 64, or that of the file.
        batch_size: prompts at a time. A prompt's answer does not depend on the others.
        device, dtype: as everywhere in this library.
        max_frames: of each video.
        system_prompt: comes before every question.
        costs: a file for what each answer cost, as JSON lines.
        options: of the method.

    Raises:
        ValueError: something that is not known, or does not fit; the message says what there is.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = EMBEDDED,
        method: str = "autoprune",
        budget: Any = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        max_frames: int = MAX_FRAMES,
        system_prompt: str | None = None,
        costs: str | None = None,
        **options: Any,
    ):
        super().__init__()
        self.method = method_of(method, budget, options)
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self.loaded = _load(pretrained, self._device(device), dtype)
        self._costs = CostFile(costs, self._rank)
        # Refused now rather than after the data sets were read.
        with self._costs.refusals():
            self.method(self.model)
        self.batch_size = _checked_batch_size(batch_size) if can_pad(self.processor) else 1
        self.max_frames, self.system_prompt = max_frames, system_prompt

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def processor(self) -> Any:
        return self.loaded.processor

    @property
    def device(self) -> torch.device:
        """Where the harness gathers what several processes found."""
        return torch.device(self.model.device)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The answers, in the order of the requests."""
        asked = [self._asked(request) for request in requests]
        found: list[Any] = [None] * len(asked)
        costs = []
        with self._progress(len(asked)) as progress:
            for indices in in_batches(asked, self.batch_size):
                generation = generation_of(asked[indices[0]].options)
                for own, conversations in self._alike(asked, indices):
                    answers = self._answer(conversations, generation)
                    self._keep([asked[i] for i in own], answers)
                    costs += [cost for _, cost in answers]
                    for i, (text, cost) in zip(own, answers, strict=True):
                        found[i] = _result(text, cost)
                        key = (asked[i].context, asked[i].options)
                        self.cache_hook.add_partial("generate_until", key, text)
                    progress.update(len(own))
        _log(costs)
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of each round; the task makes a round's question of the answers before it."""
        found = []
        for request in requests:
            asked, said, costs = self._asked(request), list[str](), []
            for conversation in self._rounds(asked, said):
                ((text, cost),) = self._answer([conversation], generation_of(asked.options))
                said.append(text)
                costs.append(cost)
            if costs:
                self._keep([asked], [("\n".join(said), cost_of_rounds(costs))])
            found.append(said)
        return found

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Mean negative log-likelihood of a token of each answer, and whether it is the greedy one.

        The harness's tasks take the answer with the lowest figure, so it is a loss and no probability,
        as in the harness's own models.
        """
        asked = [self._asked_likelihood(request) for request in requests]
        found: list[Any] = [None] * len(asked)
        with self._progress(len(asked)) as progress:
            for indices in in_batches(asked, self.batch_size):
                for own, conversations in self._alike(asked, indices):
                    targets = [
                        answer_tokens(
                            self.processor, prompt_text(self.processor, chat), asked[i].answer
                        )
                        for i, chat in zip(own, conversations, strict=True)
                    ]
                    inputs = self._inputs(conversations)
                    with torch.inference_mode(), self.method(self.model):
                        likely = likelihoods(self.model, inputs, targets)
                    for i, each in zip(own, likely, strict=True):
                        found[i] = (each.loss, each.greedy)
                    progress.update(len(own))
        return found

    def clean(self) -> None:
        """Give the model's memory free, before a judge is loaded."""
        self.loaded = Loaded(None, self.processor, self.loaded.name)
        super().clean()

    def _asked(self, request: Instance) -> Asked:
        """A chat request: its task writes the messages."""
        context, messages, options, doc_id, task, split = request.args
        return Asked(task, split, doc_id, context, messages, options, request.metadata)

    def _asked_likelihood(self, request: Instance) -> Asked:
        if len(request.args) != 6:
            raise ValueError(
                f"{request.task_name} asks for the likelihood of an answer without its question "
                "(acc_mutual_info), which a vision-language model is not asked here; leave that metric out"
            )
        context, answer, visuals, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        if callable(answer):
            answer = answer(doc)

        def messages(document: Any) -> list[dict[str, Any]]:
            return of_visuals(visuals(document) or [] if visuals else [], context)

        return Asked(task, split, doc_id, context, messages, {}, request.metadata, str(answer))

    def _rounds(self, asked: Asked, said: list[str]) -> Iterator[Conversation]:
        """A round's conversation, while its task has one; `said` grows by the answer to each."""
        doc = self.task_dict[asked.task][asked.split][asked.doc_id]
        messages, info = asked.messages(doc), None
        while True:
            yield self._conversation(messages)
            step = asked.messages(
                doc, round_idx=len(said), previous_output=list(said), previous_round_info=info
            )
            if not isinstance(step, tuple) or step[1]:
                return
            messages, _, _, info = step

    def _alike(
        self, asked: Sequence[Asked], indices: Sequence[int]
    ) -> Iterator[tuple[list[int], list[Conversation]]]:
        """Those of a batch with as many pictures and videos: processors do not take others together."""
        groups: dict[tuple[int, int], list[tuple[int, Conversation]]] = {}
        for i in indices:
            own = asked[i]
            conversation = self._conversation(
                own.messages(self.task_dict[own.task][own.split][own.doc_id])
            )
            shown = (len(conversation.images), len(conversation.videos))
            groups.setdefault(shown, []).append((i, conversation))
        for group in groups.values():
            yield [i for i, _ in group], [conversation for _, conversation in group]

    def _conversation(self, messages: Any) -> Conversation:
        return conversation_of(
            messages, takes_videos(self.processor), self.max_frames, self.system_prompt
        )

    def _inputs(self, conversations: Sequence[Conversation]) -> Any:
        inputs = encode(self.processor, conversations)
        return inputs.to(self.model.device).to(self.model.dtype)

    @torch.inference_mode()
    def _answer(
        self, conversations: Sequence[Conversation], generation: Generation
    ) -> list[tuple[str, dict[str, Any]]]:
        """The answer to each prompt of a batch, and what it cost."""
        start = time.perf_counter()
        inputs = self._inputs(conversations)
        with self._costs.refusals(), self.method(self.model) as trace:
            ids = self.model.generate(**inputs, **generation.options)
        new = ids[:, inputs["input_ids"].shape[1] :].tolist()
        seconds = (time.perf_counter() - start) / len(conversations)
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        ends = _end_tokens(self.model)
        return [
            (generation.shorten(text), cost_of(sample, seconds, _length(tokens, ends)))
            for text, tokens, sample in zip(
                texts, new, _one_each(trace.samples, len(conversations)), strict=True
            )
        ]

    def _keep(self, asked: Sequence[Asked], answers: Sequence[tuple[str, dict[str, Any]]]) -> None:
        self._costs.add(
            [
                {"task": own.task, "doc_id": own.doc_id, "prediction": text, **cost}
                for own, (text, cost) in zip(asked, answers, strict=True)
                if not own.is_padding
            ]
        )

    def _device(self, asked: str | None) -> str:
        if self._world_size > 1 and torch.cuda.is_available():
            return f"cuda:{self.accelerator.local_process_index}"
        return asked or "auto"

    def _progress(self, total: int) -> Any:
        return tqdm(total=total, disable=self._rank != 0, desc="Model Responding")


class AutoPruneSimple(AutoPruneChat):
    """The same for requests of the older kind (`--force_simple`), which tasks with likelihoods need."""

    is_simple = True

    def _asked(self, request: Instance) -> Asked:
        context, options, visuals, *text, doc_id, task, split = request.args

        def messages(document: Any, **round_of: Any) -> Any:
            if not round_of:
                return of_visuals(visuals(document) or [] if visuals else [], context)
            shown, said, ends, before, info = text[0](document, **round_of)
            return of_visuals(shown or [], said), ends, before, info

        return Asked(task, split, doc_id, context, messages, options, request.metadata)


def _load(pretrained: str, device: str, dtype: str) -> Loaded:
    if pretrained == EMBEDDED:
        return load_embedded(device, dtype)
    return load_model(str(pretrained), device, dtype)


def _checked_batch_size(value: int | str) -> int:
    if not str(value).isdigit() or int(value) < 1:
        raise ValueError(f"batch_size must be a whole number above 0, got {value!r}")
    return int(value)


def _result(text: str, cost: dict[str, Any]) -> GenerationResult:
    """The answer with its tokens: those of the prompt as a layer sees them in the mean."""
    counts = TokenCounts(
        input_tokens=round(cost["text"] + cost["entering"]), output_tokens=cost["new_tokens"]
    )
    return GenerationResult(text=text, token_counts=counts)


def _log(costs: Sequence[dict[str, Any]]) -> None:
    """Into the results of the harness, under "throughput"."""
    seconds, tokens = (sum(cost[name] for cost in costs) for name in ("seconds", "new_tokens"))
    log_metrics(
        total_elapsed_time=seconds,
        total_gen_tokens=tokens,
        avg_speed=tokens / seconds if seconds else 0.0,
        additional_metrics=summary_of(costs),
    )


def _one_each(samples: Sequence[Sample], prompts: int) -> Sequence[Sample]:
    """One for each prompt: beams repeat theirs."""
    return samples[:: max(1, len(samples) // prompts)]


def _end_tokens(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends])


def _length(tokens: Sequence[int], ends: set[int]) -> int:
    """Up to the first token that ends an answer; what is behind it pads the batch."""
    return next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
