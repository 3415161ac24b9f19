"""AutoPrune with disturbed information, and without any."""

from __future__ import annotations

import pytest
import torch

from autoprune import AutoPrune, Budget
from tests import zoo


@pytest.fixture(scope="module")
def model():
    return zoo.build("llava", "sdpa")


def run(model, only=None, **options):
    inputs = zoo.inputs("llava", model, "padded3", only=only)
    with torch.no_grad(), AutoPrune(Budget.ratio(0.5), **options)(model) as trace:
        model(**inputs)
    return trace.samples


def information(samples):
    return [sample.mutual_information for sample in samples]


def test_noise_moves_information_by_no_more_than_its_share(model):
    plain, noisy = information(run(model)), information(run(model, noise=0.5))
    shares = [b / a for a, b in zip(plain, noisy, strict=True)]
    assert len(set(shares)) == 3
    assert all(0.5 <= share <= 1.5 and abs(share - 1) > 1e-3 for share in shares)


def test_the_seed_decides(model):
    first, again, other = (information(run(model, noise=0.5, seed=s)) for s in (3, 3, 4))
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert information(run(model, seed=3)) == information(run(model))


def test_a_prompt_is_disturbed_in_a_batch_as_it_is_alone(model):
    together = information(run(model, noise=0.5))
    alone = [information(run(model, only=row, noise=0.5))[0] for row in range(3)]
    assert alone == pytest.approx(together, rel=1e-4)


def test_the_disturbed_schedule_spends_the_same_budget(model):
    for sample in run(model, noise=1.0):
        assert sum(sample.tokens_per_layer) == round(zoo.LAYERS * 0.5 * sample.num_visual)
        plan = AutoPrune(Budget.ratio(0.5)).plan(
            zoo.LAYERS, sample.num_visual, sample.mutual_information
        )
        assert sample.tokens_per_layer == plan


def test_without_gamma_and_beta_every_prompt_gets_the_same_curve(model):
    fixed = AutoPrune(Budget.ratio(0.5), gamma=0, beta=0)
    for sample in run(model, gamma=0, beta=0):
        assert sample.mutual_information > 0
        assert sample.tokens_per_layer == fixed.plan(zoo.LAYERS, sample.num_visual, 0.0)


@pytest.mark.parametrize("noise", [-0.1, 1.5, float("nan")])
def test_noise_out_of_range_is_refused(noise):
    with pytest.raises(ValueError, match=r"noise must be (a share|a finite number)"):
        AutoPrune(8, noise=noise)
