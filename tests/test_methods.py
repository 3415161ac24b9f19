"""The methods by themselves: settings, plans, and what they spend through the engine."""

from __future__ import annotations

import dataclasses
import pickle
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import autoprune
from autoprune import AutoPrune, AutoPruneReference, Budget
from autoprune.methods import METHODS, create
from autoprune.policy.budget import InfeasibleBudget
from tests import zoo

EXACT = [
    AutoPrune(Budget.ratio(0.4)),
    AutoPrune(Budget.ratio(0.2), first_cut="pre_llm"),
    AutoPrune(Budget.ratio(0.5), merger="dpc_knn"),
    AutoPrune(Budget.ratio(0.4), positions="compacted"),
    AutoPrune(Budget.ratio(0.4), mi_layer=0),
    AutoPrune(Budget.ratio(0.4), mi_layer=3, curve="linear"),
    AutoPrune(Budget.ratio(0.4), cut_every=2),
    AutoPrune(Budget.ratio(0.4), mi_layer=2, prior="linear"),
    AutoPrune(Budget.ratio(0.2), first_cut="peek"),
    AutoPrune(Budget.ratio(0.2), first_cut="peek", first_ranking="text+diversity"),
    AutoPrune(Budget.ratio(0.4), first_ranking="text"),
    AutoPrune(Budget.ratio(0.4), first_ranking="text+diversity"),
]


@pytest.fixture(scope="module")
def model():
    return zoo.build("llava", "sdpa")


def run(model, method, batch="padded3_text"):
    inputs = zoo.inputs("llava", model, batch)
    with torch.no_grad(), method(model) as trace:
        logits = model(**inputs).logits[:, -1]
    return trace.samples, logits


def test_every_method_can_be_created_by_name():
    assert set(autoprune.list_methods()) == set(METHODS)
    for name in autoprune.list_methods():
        method = autoprune.create(name, budget=8)
        assert (method.name, method.budget.value) == (name, 8)
        assert method == autoprune.create(name, budget=8)


def test_unknown_names_and_options_are_errors_that_help():
    with pytest.raises(ValueError, match="did you mean 'autoprune'"):
        autoprune.create("autoprun", budget=8)
    with pytest.raises(ValueError, match="has no option 'k1'; it has k0"):
        autoprune.create("autoprune", budget=8, k1=0.3)


@pytest.mark.parametrize(
    "options",
    [
        {"k0": -0.1},
        {"gamma": float("nan")},
        {"x0": float("inf")},
        {"text_weight": -1},
        {"curve": "logistics"},
        {"merger": "recycle"},
        {"mi_layer": -1},
        {"mi_layer": "last"},
        {"mi_layer": True},
        {"mi_layer": "peek"},
        {"mi_layer": "peek", "first_cut": "pre_llm"},
        {"mi_layer": 1.5},
        {"cut_every": 0},
        {"cut_every": 2.5},
        {"first_cut": "before"},
        {"first_ranking": "vision"},
        {"first_ranking": "diversity"},
        {"prior": "straight"},
        {"prior": None},
        {"positions": "new"},
        {"budget": 0},
        {"budget": True},
    ],
)
def test_settings_out_of_range_are_refused_and_named(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=name if name != "budget" else "Budget"):
        AutoPrune(**options)


def test_the_reference_only_takes_its_own_kind_of_budget():
    assert AutoPruneReference(budget=64).budget == Budget.tokens(64, counted="leaving")
    with pytest.raises(ValueError, match="leaving"):
        AutoPruneReference(budget=Budget.ratio(0.5))


@pytest.mark.parametrize("cls", [AutoPrune, AutoPruneReference])
def test_a_methods_budget_is_a_budget_whatever_was_given(cls):
    counted = "leaving" if cls is AutoPruneReference else "entering"
    assert cls().budget == Budget.tokens(64, counted)
    method = cls(12, k0=0.3)
    assert method.budget == Budget.tokens(12, counted)
    assert dataclasses.replace(method, budget=9).budget == Budget.tokens(9, counted)
    assert dataclasses.replace(method, k0=0.5).budget == method.budget
    assert pickle.loads(pickle.dumps(method)) == method != cls(13, k0=0.3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.budget = 9


@pytest.mark.parametrize("method", EXACT, ids=str)
def test_every_prompt_spends_exactly_the_budget(model, method):
    samples, _ = run(model, method)
    for sample in samples:
        counts, total = sample.tokens_per_layer, sample.num_visual
        assert sum(counts) == round(zoo.LAYERS * method.budget.value * total)
        assert counts == sorted(counts, reverse=True)
        assert counts == sample.schedule
        assert [len(kept) for kept in sample.kept] == counts or method == EXACT[2]
        for before, after in zip(sample.kept, sample.kept[1:], strict=False):
            assert set(after.tolist()) <= set(before.tolist())


def test_merged_tokens_take_places_of_the_budget(model):
    # A tenth of thirty per cent: it takes a large picture to see two clusters, a small one for one.
    samples, _ = run(model, EXACT[2])
    for sample in samples:
        kept = [len(kept) for kept in sample.kept]
        merged = [n - k for n, k in zip(sample.tokens_per_layer, kept, strict=True)]
        assert min(merged) >= 0
        assert (max(merged) > 0) == (sample.num_visual > 0)


@pytest.mark.parametrize("method", EXACT, ids=str)
def test_a_prompt_gets_in_a_batch_what_it_gets_alone(model, method):
    samples, logits = run(model, method)
    alone = zoo.inputs("llava", model, "padded3_text")
    real = alone["attention_mask"][0].bool()
    pictures = int(samples[0].num_visual / (zoo.visual_mask(model, alone["input_ids"]).sum() / 2))
    inputs = {
        "input_ids": alone["input_ids"][:1, real],
        "pixel_values": alone["pixel_values"][:pictures],
    }
    with torch.no_grad(), method(model) as trace:
        single = model(**inputs).logits[:, -1]
    (sample,) = trace.samples
    assert sample.tokens_per_layer == samples[0].tokens_per_layer
    assert all(map(torch.equal, sample.kept, samples[0].kept))
    torch.testing.assert_close(single[0], logits[0], atol=2e-4, rtol=0)


@pytest.mark.parametrize("method", EXACT, ids=str)
def test_the_plan_without_a_model_is_the_one_that_is_followed(model, method):
    for sample in run(model, method)[0]:
        if sample.num_visual:
            plan = method.plan(zoo.LAYERS, sample.num_visual, sample.mutual_information)
            assert plan == sample.tokens_per_layer


@pytest.mark.parametrize("prior", ["curve", "linear"])
@pytest.mark.parametrize("first_cut", ["after_layer_0", "pre_llm", "peek"])
def test_easy_is_much_information_and_pruned_early_hard_is_little_and_pruned_late(first_cut, prior):
    """In the words of docs/method.md: easy = large I, a flat curve; hard = small I, a steep one."""
    method = AutoPrune(64, first_cut=first_cut, prior=prior)
    easy, hard = (method.plan(32, 576, bits) for bits in (1.0, 0.1))
    assert sum(easy) == sum(hard) == 64 * 32
    behind = method.mi_layer + 1
    assert easy[:behind] == hard[:behind]  # before anything is measured all prompts are alike
    turn = next(layer for layer in range(behind, 32) if easy[layer] >= hard[layer])
    # Hard: nearly everything is kept early, and narrowed late.
    assert hard[behind + 4] > 0.95 * hard[behind - 1]
    assert hard[-1] < 0.02 * hard[behind - 1]
    # Easy: pruned hard from the first layers on, then held.
    assert easy[behind] < 0.85 * easy[behind - 1]
    assert easy[-1] > 0.15 * easy[behind - 1]
    assert all(h > e for h, e in zip(hard[behind:turn], easy[behind:turn], strict=True))
    assert all(h <= e for h, e in zip(hard[turn:], easy[turn:], strict=True))
    steep, flat = method.retention(32, [0.1, 1.0])
    assert steep[0] / steep[-1] > 50 * flat[0] / flat[-1]


def test_one_setting_serves_every_depth():
    shallow, deep = (AutoPrune(Budget.ratio(0.25)).retention(n, [0.5])[0] for n in (16, 32))
    assert shallow == pytest.approx(deep[::2])


def test_infeasible_budgets_name_the_smallest_and_it_works():
    with pytest.raises(InfeasibleBudget, match="pre_llm") as refused:
        AutoPrune(16).plan(32, 576, 0.5)
    smallest = refused.value.smallest
    assert str(refused.value).startswith(
        "the smallest feasible budget here is Budget.tokens(18.9688)"
    )
    assert sum(AutoPrune(smallest).plan(32, 576, 0.5)) == 576 + 31
    for first_cut in ("pre_llm", "peek"):
        assert f'first_cut="{first_cut}"' in str(refused.value)
        assert sum(AutoPrune(16, first_cut=first_cut).plan(32, 576, 0.5)) == 512
        assert AutoPrune(1, first_cut=first_cut).plan(32, 576, 0.5) == [1] * 32
        with pytest.raises(
            InfeasibleBudget, match=r"smallest feasible budget here is Budget\.tokens\(1\)"
        ):
            AutoPrune(0.9, first_cut=first_cut).plan(32, 576, 0.5)


@pytest.mark.parametrize(
    ("first_cut", "first_ranking", "message"),
    [
        (
            "pre_llm",
            "text",
            "'pre_llm' can rank by 'vision', got first_ranking='text'; leave it out",
        ),
        (
            "peek",
            "vision",
            "'text' or 'text\\+vision' or 'text\\+diversity', got first_ranking='vision'",
        ),
        ("after_layer_0", "dpp", "got first_ranking='dpp'; leave it out for 'text\\+vision'"),
    ],
)
def test_rankings_that_a_first_cut_cannot_have(first_cut, first_ranking, message):
    with pytest.raises(ValueError, match=message):
        AutoPrune(64, first_cut=first_cut, first_ranking=first_ranking)


def plan_of(method):
    information = (0.5,) if isinstance(method, AutoPrune) else ()
    return method.plan(32, 576, *information)


@pytest.mark.parametrize("name", ["autoprune", "fastv"])
def test_a_share_given_as_tokens_is_told_how_shares_are_written(name):
    with pytest.raises(
        InfeasibleBudget, match=r"write Budget\.ratio\(0\.11\) if a share"
    ) as refused:
        plan_of(create(name, 0.11))
    assert refused.value.asked == Budget.tokens(0.11)
    with pytest.raises(InfeasibleBudget) as refused:
        plan_of(create(name, 10))
    assert "share" not in str(refused.value)


def test_pre_llm_needs_scores_of_the_vision_tower(model):
    method = AutoPrune(4, first_cut="pre_llm")
    inputs = zoo.inputs("llava", model)
    visual = zoo.visual_mask(model, inputs["input_ids"])
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with method(model, visual_mask=visual), pytest.raises(ValueError, match="vision_scores"):
        model(inputs_embeds=embeds)


BY_TOWER = ("fastervlm", "vispruner", "visionzip", "prumerge", "hiprune", "scope", "tome")


@pytest.mark.parametrize(
    ("method", "masks"),
    [
        (AutoPrune(Budget.ratio(0.5), first_cut="pre_llm", x0=1000.0), True),
        *((autoprune.create(name, Budget.ratio(0.5)), True) for name in BY_TOWER),
        (autoprune.create("fastervlm", Budget.ratio(0.5), mask_padding=False), False),
        (autoprune.create("hiprune", Budget.ratio(0.5), mask_padding=False), False),
    ],
    ids=str,
)
def test_padding_of_a_square_picture_never_wins_unless_it_is_not_masked(model, method, masks):
    inputs = zoo.inputs("llava", model)
    pixels = inputs["pixel_values"].clone()
    rows = pixels.shape[2] // 4
    pixels[:, :, :rows], pixels[:, :, -rows:] = 0.25, 0.25
    total = int(zoo.visual_mask(model, inputs["input_ids"]).sum())
    with torch.no_grad(), method(model) as trace:
        model(**dict(inputs, pixel_values=pixels))
    real = torch.arange(total)[total // 4 : -total // 4]
    assert torch.equal(trace.samples[0].kept[0], real) == masks


def test_random_keeps_other_tokens_for_another_seed(model):
    kept = [
        run(model, autoprune.create("random", budget=Budget.ratio(0.5), seed=seed))[0][0].kept[0]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


def test_the_page_of_methods_is_written_from_the_code():
    root = Path(__file__).parent.parent
    page = runpy.run_path(str(root / "tools" / "readme.py"))["methods_page"]()
    assert (root / "docs" / "methods.md").read_text(encoding="utf-8") == page, "run `make readme`"
    assert all(f"\n## {name}\n" in page for name in METHODS)


@pytest.mark.parametrize(
    ("name", "setting", "expected"),
    [
        ("dart", {"visual_pivots": 1.5}, "a whole number"),
        ("prumerge", {"neighbours": 2.5}, "a whole number"),
        ("random", {"seed": 1.5}, "a whole number"),
        ("folder", {"rounds": float("inf")}, "a whole number"),
        ("tome", {"rounds": float("nan")}, "a whole number"),
        ("autoprune", {"k0": "0.4"}, "a finite number"),
        ("autoprune_reference", {"x0": float("nan")}, "a finite number"),
        ("fastv", {"layer": "2"}, "a finite number"),
        ("hiprune", {"alpha": "1"}, "a finite number"),
        ("sparsevlm", {"recycle": "no"}, "True or False"),
        ("cdpruner", {"negative": "no"}, "True or False"),
    ],
)
def test_a_setting_of_another_kind_is_refused_when_the_method_is_made(name, setting, expected):
    (option,) = setting
    with pytest.raises(ValueError, match=f"{name}: {option} must be {expected}, got"):
        autoprune.create(name, 64, **setting)


@pytest.mark.parametrize("name", autoprune.list_methods())
def test_numbers_of_numpy_will_do(name):
    method = autoprune.create(name, 64)
    kinds = {int: np.int64, float: np.float32}
    given = {
        option.name: kinds[type(value)](value)
        for option in dataclasses.fields(method)
        if type(value := getattr(method, option.name)) in kinds
    }
    dataclasses.replace(method, **given)
