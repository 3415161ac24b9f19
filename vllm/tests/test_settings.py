"""What a server and a request may say, without vLLM."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune_vllm.cli import possible_methods
from autoprune_vllm.families import family_of, overrides
from autoprune_vllm.settings import Amount, Settings

BAD_BUDGETS = [0, -1, "x", "64", 1.5, 64.0, True, False, [64], {}, float("nan"), 10**30 * -1]
BAD_RATIOS = [0, 0.0, -0.5, 1.01, "x", True, float("nan"), float("inf"), [0.5], {}]


@pytest.mark.parametrize("budget", BAD_BUDGETS, ids=repr)
def test_what_is_no_budget_is_refused_with_what_was_given(budget):
    with pytest.raises(ValueError, match="budget must be a whole number") as error:
        Amount.of({"budget": budget})
    assert repr(budget) in str(error.value)


@pytest.mark.parametrize("ratio", BAD_RATIOS, ids=repr)
def test_what_is_no_ratio_is_refused(ratio):
    with pytest.raises(ValueError, match="ratio must be the share"):
        Amount.of({"ratio": ratio})


def test_a_budget_and_a_ratio_exclude_each_other():
    with pytest.raises(ValueError, match="not both"):
        Amount.of({"budget": 3, "ratio": 0.5})


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_a_servers_budget_keeps_small_pictures_whole(budget, number):
    assert Amount(budget).count(number) == min(budget, number)


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 2000))
def test_a_ratio_is_never_exceeded_and_leaves_a_token(ratio, number):
    count = Amount(ratio=ratio).count(number)
    assert count == max(1, math.floor(ratio * number))
    assert 1 <= count <= number


def test_a_request_for_more_than_there_is_names_what_there_is():
    with pytest.raises(
        ValueError, match="budget of 145 visual tokens is more than the picture's 144"
    ):
        Amount(145, strict=True).count(144)


def test_nothing_asked_for_leaves_all():
    assert Amount().count(144) == 144


def test_a_request_replaces_the_servers_amount():
    settings = Settings.of({"method": "scope", "budget": 64, "options": {"alpha": 0.5}})
    assert settings.method.alpha == 0.5
    assert settings.for_request({"max_pixels": 5}).count(144) == 64
    assert settings.for_request({"autoprune": {"budget": 36}}).count(144) == 36
    assert settings.for_request({"autoprune": {"ratio": 0.25}}).count(144) == 36
    assert settings.for_request({"autoprune": {}}).count(144) == 144


@pytest.mark.parametrize("given", [36, "36", [36], True], ids=repr)
def test_a_request_is_a_table(given):
    with pytest.raises(ValueError, match="must be a table"):
        Settings.of({}).for_request({"autoprune": given})


def test_unknown_settings_are_named():
    with pytest.raises(ValueError, match="no setting 'buget'; it has budget, ratio"):
        Settings.of({}).for_request({"autoprune": {"buget": 36}})
    with pytest.raises(ValueError, match="no setting 'keep'"):
        Settings.of({"keep": 3})
    with pytest.raises(ValueError, match="no option 'alpha'"):
        Settings.of({"method": "fastervlm", "options": {"alpha": 1}})
    with pytest.raises(ValueError, match="did you mean 'scope'"):
        Settings.of({"method": "scop"})


def test_methods_that_see_the_text_or_cut_later_are_refused():
    for name in ("autoprune", "fastv", "cdpruner", "tome", "noimage"):
        with pytest.raises(ValueError, match=r"cannot prune a picture|there is no method"):
            Settings.of({"method": name})


def test_the_methods_that_can_be_used():
    assert possible_methods() == [
        "fastervlm",
        "vispruner",
        "visionzip",
        "prumerge",
        "hiprune",
        "divprune",
        "scope",
        "folder",
        "pooling",
        "uniform",
        "random",
    ]


def test_other_models_are_refused_by_name():
    from transformers import Gemma3Config, LlavaConfig, SiglipVisionConfig

    with pytest.raises(ValueError, match=r"does not prune models of type 'gemma3'.*LLaVA-NeXT"):
        family_of(Gemma3Config())
    with pytest.raises(ValueError, match="'siglip_vision_model'"):
        family_of(LlavaConfig(vision_config=SiglipVisionConfig()))


def test_overrides_name_the_class_and_the_settings():
    from autoprune import tiny

    assert overrides(str(tiny.path()), "scope", 64, options={"alpha": 0.5}) == {
        "architectures": ["AutoPruneLlava"],
        "autoprune": {"method": "scope", "budget": 64, "options": {"alpha": 0.5}},
    }
    with pytest.raises(ValueError, match="budget must be"):
        overrides(str(tiny.path()), "scope", 0)
