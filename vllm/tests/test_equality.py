"""vLLM's answers are those of the library's methods in transformers, token for token, in every family.

One engine for each family, made to be as hard as it can be: prompts come in parts of 24 tokens, so most are cut
inside of a picture; key and value blocks are few, so prompts are preempted; prefixes are cached.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from equality import Ask, Reference, answers, generate, model_of, pictures, prune_by
from vllm.v1.core.sched.scheduler import Scheduler

from autoprune_vllm import FAMILIES, overrides
from autoprune_vllm.cli import possible_methods

SIZES = {"llava": [(64, 64), (64, 40)], None: [(64, 64), (96, 48)]}
QUESTIONS = ("what color is the circle ?", "how many objects are there ?")
BUDGETS = (1, 3, 8, 12, None)


class Pair:
    """An engine of vLLM and the same model in transformers."""

    def __init__(self, family: str, folder: Any, start: Any):
        self.family, self.reference = family, Reference(folder)
        settings = overrides(str(folder), "divprune")
        hard = {"max_num_batched_tokens": 24, "max_num_seqs": 8, "num_gpu_blocks_override": 14}
        self.engine = start(folder, hf_overrides=settings, **hard)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return SIZES.get(self.family, SIZES[None])

    def asks(self, budgets: tuple[int | None, ...] = BUDGETS) -> list[Ask]:
        """Every picture with every budget, and questions that differ."""
        return [
            Ask(self.reference.text(QUESTIONS[i % 2]), [picture], budget)
            for budget in budgets
            for i, picture in enumerate(pictures(3, self.sizes))
        ]


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request: Any, checkpoint: Any, start_engine: Any) -> Pair:
    return Pair(request.param, checkpoint(request.param), start_engine)


def test_the_class_is_the_plugins_own(pair):
    model = type(model_of(pair.engine))
    assert model.__name__ == FAMILIES[pair.family].architecture
    assert model.__module__.startswith("autoprune_vllm")


@pytest.mark.parametrize("method", possible_methods())
def test_answers_are_those_of_transformers(pair, method):
    """Budgets are mixed in one batch, whole pictures among them."""
    prune_by(pair.engine, method)
    asks = pair.asks()
    want = [pair.reference.answer(ask, method) for ask in asks]
    assert answers(pair.engine, asks) == want


def test_budgets_change_the_answers(pair):
    """Else equal answers would say little."""
    told = {tuple(pair.reference.answer(ask, "divprune")) for ask in pair.asks((1, 3, 8, None))}
    assert len(told) >= 9


def test_a_prompt_has_as_many_tokens_as_its_budget(pair):
    prune_by(pair.engine, "divprune")
    text, picture = pair.reference.text(QUESTIONS[0]), pictures(1, pair.sizes)
    asks = [Ask(text, picture, budget) for budget in (3, 8, None)]
    few, more, whole = (len(output.prompt_token_ids) for output in generate(pair.engine, asks))
    assert more == few + 5
    _, sample = pair.reference.run(asks[0], "divprune")
    assert whole == few - 3 + sample.num_visual


def test_answers_are_the_same_from_cached_prefixes(pair):
    """Prefixes that end inside of a picture and behind it; text behind is numbered as before."""
    prune_by(pair.engine, "uniform")
    words = "the red circle is left of the blue square and " * 4
    asks = [
        Ask(pair.reference.text(words + question), pair.asks()[0].pictures, budget)
        for question in QUESTIONS
        for budget in (8, 12, None)
    ]
    want = [pair.reference.answer(ask, "uniform") for ask in asks]
    cached = 0
    for ask, told in zip(asks * 2, want * 2, strict=True):
        (output,) = generate(pair.engine, [ask])
        assert list(output.outputs[0].token_ids) == told
        cached += output.num_cached_tokens or 0
    assert cached >= 64


def test_budgets_never_share_cached_prefixes(pair):
    """The same picture and question, so the same tokens as far as the smaller budget goes."""
    prune_by(pair.engine, "divprune")
    words = "the red circle is left of the blue square and " * 4
    picture = pair.asks()[0].pictures
    for budget in (8, 12):
        ask = Ask(pair.reference.text(words + QUESTIONS[0]), picture, budget)
        (output,) = generate(pair.engine, [ask])
        assert not output.num_cached_tokens
        assert list(output.outputs[0].token_ids) == pair.reference.answer(ask, "divprune")


def test_prompts_that_are_preempted_answer_the_same(pair, monkeypatch):
    prune_by(pair.engine, "divprune")
    preempted, preempt = [], Scheduler._preempt_request

    def count(self: Scheduler, request: Any, *args: Any, **options: Any) -> Any:
        preempted.append(request)
        return preempt(self, request, *args, **options)

    monkeypatch.setattr(Scheduler, "_preempt_request", count)
    # Long answers: eight prompts of two blocks each need others while they are answered.
    text = pair.reference.text("circle " * 30 + QUESTIONS[0])
    asks = [Ask(text, [picture], 8, new_tokens=40) for picture in pictures(8, pair.sizes)]
    assert answers(pair.engine, asks) == [pair.reference.answer(ask, "divprune") for ask in asks]
    assert preempted


def two(pair: Pair, text: str, budget: int | None) -> tuple[Ask, list[int]]:
    """A prompt with two pictures, and what transformers says where each keeps what it keeps alone."""
    both = pictures(2, pair.sizes)
    ask = Ask(text, both, budget)
    if budget is None:
        return ask, pair.reference.answer(ask, "fastervlm")
    scores = []
    for picture in both:
        alone = Ask(pair.reference.text(QUESTIONS[0]), [picture], budget)
        _, sample = pair.reference.run(alone, "fastervlm")
        stays = torch.zeros(sample.num_visual)
        stays[sample.kept[0]] = 1.0
        scores.append(stays)
    joint = Ask(text, both, 2 * budget)
    return ask, pair.reference.answer(joint, "fastervlm", vision_scores=torch.cat(scores))


@pytest.mark.parametrize("budget", [1, 5, None])
def test_each_of_two_pictures_has_the_budget(pair, budget):
    prune_by(pair.engine, "fastervlm")
    ask, told = two(pair, pair.reference.text(QUESTIONS[0], pictures=2), budget)
    assert answers(pair.engine, [ask]) == [told]


@pytest.mark.parametrize("budget", [1, 5])
def test_pictures_may_stand_apart(pair, budget):
    prune_by(pair.engine, "fastervlm")
    joined = pair.reference.text(QUESTIONS[0], pictures=1)
    start, question = joined.split(" what ")
    text = f"{start} left of{start.removeprefix('<s>')} what {question}"
    ask, told = two(pair, text, budget)
    assert answers(pair.engine, [ask]) == [told]


@pytest.mark.parametrize(
    ("budget", "why"),
    [*((bad, "whole number") for bad in (0, -1, "x", 1.5, True)), (10_000, "than the picture's")],
)
def test_a_bad_budget_is_refused_and_nothing_else_disturbed(pair, budget, why):
    prune_by(pair.engine, "divprune")
    good = pair.asks((3,))[0]
    told = answers(pair.engine, [good])
    with pytest.raises(ValueError, match=why):
        generate(pair.engine, [Ask(good.text, good.pictures, budget)])
    assert answers(pair.engine, [good]) == told


def test_a_prompt_that_ends_with_its_picture_is_refused(pair):
    good = pair.asks((3,))[0]
    mark = good.text.split(" what ")[0]
    if pair.family in ("llava", "llava_next"):
        with pytest.raises(ValueError, match="ends with a picture"):
            generate(pair.engine, [Ask(mark, good.pictures, 3)])


def test_image_tokens_in_the_text_are_refused(pair):
    """vLLM would give such a prompt's second token no embedding of a picture."""
    good = pair.asks((3,))[0]
    token = pair.reference.processor.image_token
    with pytest.raises(ValueError, match="belong to no picture"):
        generate(pair.engine, [Ask(f"{good.text} {token} ?", good.pictures, 3)])
