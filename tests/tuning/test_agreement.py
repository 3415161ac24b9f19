"""Agreement and divergence are what a slow calculation gives, and need no second way of answering."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune import AutoPrune, tiny
from autoprune.evaluation.batches import prepare
from autoprune.methods.fastv import FastV
from autoprune.tuning import built_in_prompts
from autoprune.tuning.agreement import Scores, agreement, divergence, plain_answers, scores


@pytest.fixture(scope="module")
def model_and_processor():
    return tiny.load()


@pytest.fixture(scope="module")
def batch(model_and_processor):
    return prepare(*model_and_processor, built_in_prompts(9), 9)[0]


def test_short_answers_count_whole_and_long_ones_by_the_token():
    same = torch.ones(4, 12, dtype=torch.bool)
    same[0, 5:] = False  # behind the end
    same[1, 2] = False
    same[2, [0, 4, 9]] = False
    same[3, 7] = False
    lengths = torch.tensor([5, 5, 10, 8])
    assert agreement(same, lengths).tolist() == [1.0, 0.0, 0.7, 0.0]


def slow_divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 40), st.integers(1, 8))
def test_divergence_is_that_of_the_likely_tokens_and_one_for_the_rest(seed, vocabulary, likely):
    generator = torch.Generator().manual_seed(seed)
    p, q = (
        (2 * torch.randn(1, vocabulary, generator=generator, dtype=torch.float64)).softmax(-1)
        for _ in range(2)
    )
    top = p.topk(min(likely, vocabulary))
    found = divergence(top.indices, top.values.log(), q.log()).item()
    chosen = top.indices[0].tolist()
    lumped = [
        [own[i] for i in chosen] + [max(1e-300, 1 - sum(own[i] for i in chosen))]
        for own in (p[0].tolist(), q[0].tolist())
    ]
    if len(chosen) == vocabulary:
        lumped = [own[:-1] for own in lumped]
    assert found == pytest.approx(slow_divergence(*lumped), abs=1e-9)
    assert found <= slow_divergence(p[0].tolist(), q[0].tolist()) + 1e-9


def test_what_is_impossible_makes_no_nan():
    likely, logs = torch.tensor([[0, 1]]), torch.tensor([[0.0, float("-inf")]])
    other = torch.tensor([[float("-inf"), 0.0, float("-inf")]])
    assert divergence(likely, logs, other).item() == pytest.approx(50)
    assert divergence(likely, logs, torch.full((1, 3), float("nan"))).item() == 50


def test_a_budget_that_prunes_nothing_agrees_fully(model_and_processor, batch):
    model, _ = model_and_processor
    found = scores(model, AutoPrune(144), batch, plain_answers(model, batch, 8))
    assert found.agreement.tolist() == [1.0] * 9
    assert np.abs(found.divergence).max() < 1e-5
    assert found.entering.tolist() == [144.0] * 9 and found.flops_share.tolist() == [1.0] * 9


@pytest.mark.parametrize("method", [FastV(12), AutoPrune(12)])
def test_agreement_is_that_of_the_greedy_answers(model_and_processor, batch, method):
    model, processor = model_and_processor
    answers = plain_answers(model, batch, 8)

    def texts():
        ids = model.generate(**batch.inputs(), max_new_tokens=8, do_sample=False)
        new = ids[:, batch.inputs()["input_ids"].shape[1] :]
        return processor.batch_decode(new, skip_special_tokens=False)

    with torch.inference_mode():
        plain = texts()
        with method(model):
            pruned = texts()
    equal = [
        a.replace("<pad>", "") == b.replace("<pad>", "") for a, b in zip(plain, pruned, strict=True)
    ]
    found = scores(model, method, batch, answers)
    assert found.agreement.tolist() == [float(same) for same in equal]
    assert 0 < sum(equal) < 9
    assert found.entering.tolist() == pytest.approx([12] * 9, abs=1)
    assert (found.milliseconds > 0).all()


def test_divergence_of_the_first_token_is_that_of_a_forward(model_and_processor, batch):
    model, _ = model_and_processor
    method = FastV(12)
    found = scores(model, method, batch, plain_answers(model, batch, 1))
    with torch.inference_mode():
        p = model(**batch.inputs()).logits[:, -1].double().softmax(-1)
        with method(model):
            q = model(**batch.inputs()).logits[:, -1].double().softmax(-1)
    whole = [slow_divergence(a, b) for a, b in zip(p.tolist(), q.tolist(), strict=True)]
    assert found.divergence == pytest.approx(whole, abs=2e-3)
    assert max(whole) > 0.05


def test_the_answers_end_where_the_model_ends_them(model_and_processor, batch):
    model, _ = model_and_processor
    answers = plain_answers(model, batch, 8)
    end = model.generation_config.eos_token_id
    for tokens, length in zip(answers.tokens.tolist(), answers.lengths.tolist(), strict=True):
        assert tokens[length - 1] == end and end not in tokens[: length - 1]
    cut = plain_answers(model, batch, 1)
    assert cut.lengths.tolist() == [1] * 9
    assert cut.tokens[:, 0].tolist() == answers.tokens[:, 0].tolist()
    assert answers.likely[:, 0, 0].tolist() == answers.tokens[:, 0].tolist()


def test_divergence_only_breaks_ties():
    def of(agreement, divergence):
        same = np.array(agreement, float)
        return Scores(same, np.full(len(same), divergence), same, same, same).value

    assert of([1, 1, 0], 0.1) > of([1, 1, 0], 0.2) > of([1, 0, 0], 0.0)
    assert of([1, 1, 0], 1e6) > of([1, 0, 0], 0.0)
