"""Budgets per picture: quotas of each picture of a prompt."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune import AutoPrune, Budget, per_prompt
from autoprune.contract import ModelShape, Observation, Prompts, PromptState
from autoprune.engine.tokens.layout import Layout
from autoprune.engine.tokens.pictures import picture_sizes
from autoprune.methods.from_text import build_method
from autoprune.methods.per_picture import ranked_by_picture
from autoprune.parts.pictures import by_picture, picture_of, totals
from autoprune.policy.cost import DecoderCost
from tests import oracle, zoo

IMAGE, BREAK, END, FAKE = 9, 7, 8, 6
model_of = functools.cache(zoo.build)
SEVERAL = [name for name, family in zoo.FAMILIES.items() if family.several_images]


def sizes_of(rows: list[list[int]], name: str = "llava_next", with_ids: bool = True):
    config = zoo.FAMILIES[name].config()
    ids = torch.tensor(rows)
    layout = Layout((ids > 0).numpy(), (ids == IMAGE).numpy())
    return picture_sizes(layout, ids if with_ids else None, config)


def test_a_picture_is_a_run_of_visual_tokens():
    rows = [[1, 9, 9, 3, 9, 9, 9, 4], [0, 0, 1, 9, 9, 9, 9, 5], [0, 0, 0, 0, 1, 2, 3, 4]]
    assert sizes_of(rows) == [[2, 3], [4], []]
    assert sizes_of(rows, with_ids=False) == [[2, 3], [4], []]
    assert sizes_of([[9, 1, 9, 9]]) == [[1, 2]]


def test_rows_of_one_picture_are_one_picture():
    picture = [9, 9, BREAK, 9, 9, BREAK, 9, 9, END]
    other = [9, 9, 9, BREAK, 9, 9, 9, END]
    assert sizes_of([[1, *picture, *other, 2]], "mistral3") == [[6, 6]]
    assert sizes_of([[1, *picture, 3, 4, *other, 2]], "mistral3") == [[6, 6]]
    assert sizes_of([[1, *picture]], "mistral3") == [[6]]
    assert sizes_of([[1, *picture, 2]], "llava_next") == [[2, 2, 2]]


@pytest.mark.parametrize("model_type", ["idefics3", "smolvlm"])
def test_tiles_of_one_picture_are_one_picture(model_type):
    newline, first, second, whole = 2, 3, 4, 5
    tiles = [FAKE, first, 9, 9, FAKE, second, 9, 9, newline, newline, FAKE, whole, 9, 9, FAKE]
    single = [FAKE, whole, 9, 9, FAKE]
    assert sizes_of([[1, *tiles, *single, 1]], model_type) == [[6, 2]]
    assert sizes_of([[1, *single, 1, 1, *tiles, 1]], model_type) == [[2, 6]]
    assert sizes_of([[1, *single, 1, 1, *single, 1]], model_type) == [[2, 2]]


def test_pictures_of_one_size_need_nothing_between_them():
    for name, number in (("llava", 16), ("paligemma", 16), ("senna", 8)):
        whole = [1, *[9] * (3 * number), 2, *[9] * number, 2]
        assert sizes_of([whole], name) == [[number] * 4]
        assert sizes_of([[1, *[9] * (number + 1), 2]], name) == [[number + 1]]
    assert sizes_of([[1, *[9] * 48, 2]], "llava_next") == [[48]]
    full = zoo.FAMILIES["llava"].config()
    full.vision_feature_select_strategy = "full"
    visual = np.array([[False, *[True] * 34, False]])
    assert picture_sizes(Layout(np.ones_like(visual), visual), None, full) == [[17, 17]]


def slow_order(scores: list[float], picture: list[int], shares: list[float]) -> list[int]:
    """Give one token at a time to the picture that is due next, the best of its tokens that are left."""
    left = {p: [i for i, own in enumerate(picture) if own == p] for p in set(picture)}
    for own in left.values():
        own.sort(key=lambda i: (-scores[i], i))
    taken, order = dict.fromkeys(left, 0), []
    while any(left.values()):
        due = [
            (np.float32(taken[p] + 0.5) / np.float32(shares[p]), -scores[own[0]], own[0], p)
            for p, own in left.items()
            if own
        ]
        *_, token, p = min(due)
        left[p].remove(token)
        taken[p] += 1
        order.append(token)
    return order


@st.composite
def pictures(draw):
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    number = sum(sizes)
    scores = draw(st.lists(st.integers(0, 5), min_size=number, max_size=number))
    shares = draw(st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=len(sizes), max_size=5))
    return sizes, [float(score) for score in scores], shares[: len(sizes)]


def ranked(sizes, scores, shares) -> list[int]:
    picture = picture_of(torch.arange(len(scores))[None], [sizes])
    new = by_picture(torch.tensor([scores]), picture, torch.tensor([shares]))
    return new[0].argsort(descending=True).tolist()


@settings(max_examples=200, deadline=None)
@given(pictures())
def test_the_order_is_that_of_giving_one_token_at_a_time(case):
    sizes, scores, shares = case
    picture = np.repeat(range(len(sizes)), sizes).tolist()
    assert ranked(sizes, scores, shares) == slow_order(scores, picture, shares)


@settings(max_examples=200, deadline=None)
@given(pictures())
def test_equal_quotas_differ_by_one_where_there_are_tokens(case):
    sizes, scores, _ = case
    picture = np.repeat(range(len(sizes)), sizes)
    order = ranked(sizes, scores, [1.0] * len(sizes))
    assert sorted(order) == list(range(len(scores)))
    for number in range(len(scores) + 1):
        counts = np.bincount(picture[order[:number]], minlength=len(sizes))
        assert counts.sum() == number
        assert (counts <= sizes).all()
        free = counts[counts < sizes]
        if len(free):
            assert counts.max() - free.min() <= 1


@settings(max_examples=100, deadline=None)
@given(pictures())
def test_given_shares_are_a_water_filling(case):
    """Each picture has its share of a level, rounded, or all that it has."""
    sizes, scores, shares = case
    picture = np.repeat(range(len(sizes)), sizes)
    order, shares = ranked(sizes, scores, shares), np.array(shares)
    for number in range(1, len(scores)):
        counts = np.bincount(picture[order[:number]], minlength=len(sizes))
        lowest = ((counts - 0.5) / shares)[counts > 0].max()
        free = counts < sizes
        highest = ((counts + 0.5) / shares)[free].min()
        # One level rounds to all of these counts.
        assert lowest <= highest + 1e-6


def test_prompts_with_other_numbers_of_pictures_share_a_batch():
    index = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, -1, -1], [0, 2, -2, 4, -1]])
    picture = picture_of(index, [[2, 3], [3], [1, 1, 3]])
    assert picture.tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 3, 3], [0, 2, 3, 2, 3]]
    assert totals(torch.ones(3, 5), picture, 3).tolist() == [[2, 3, 0], [3, 0, 0], [1, 0, 2]]
    scores = by_picture(torch.tensor([[5.0, 4, 3, 2, 1]] * 3), picture, torch.ones(3, 3))
    assert scores[0].argsort(descending=True).tolist() == [0, 2, 1, 3, 4]
    assert scores[1].argsort(descending=True)[2:].tolist() == [0, 1, 2]
    # What was merged is of no picture, and stands first.
    assert scores[2].argsort(descending=True).tolist()[:1] == [2]


def test_a_share_of_nothing_gets_what_the_others_leave():
    assert ranked([2, 2, 1], [1, 2, 9, 8, 3], [1.0, 0.0, 1.0]) == [4, 1, 0, 2, 3]
    assert ranked([2, 2], [1, 2, 9, 8], [float("nan"), 1.0]) == [2, 3, 1, 0]


@pytest.mark.parametrize("shares", [(1e-50, 1e-50), (1e300, 1e300), (70000, 70000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_scale_of_shares_does_not_matter(shares, dtype):
    prompts = Prompts([4], [1], pictures=[[2, 2]])
    cost = DecoderCost(2, hidden=8, heads=2, kv_heads=2, head_dim=4, intermediate=8)
    state = PromptState(ModelShape(2, cost, has_vision_scores=False), prompts)
    index = torch.arange(4)[None]
    seen = Observation(1, [4], index, torch.ones_like(index, dtype=torch.bool), None)
    scores = torch.tensor([[9.0, 8, 2, 1]], dtype=dtype)
    order = ranked_by_picture(scores, shares, seen, state)[0].argsort(descending=True)
    assert order.tolist() == [0, 2, 1, 3]


def check(sample, equal: bool = True) -> None:
    """Sums are exact, no quota is above what is there, and later sets are parts of earlier ones."""
    before = sample.pictures
    assert sum(before) == sample.num_visual
    for layer, number in enumerate(sample.tokens_per_layer):
        counts = sample.kept_by_picture(layer)
        assert sum(counts) == number == len(sample.kept[layer])
        assert all(count <= most for count, most in zip(counts, before, strict=True))
        if layer:
            assert set(sample.kept[layer].tolist()) <= set(sample.kept[layer - 1].tolist())
        free = [c for c, most in zip(counts, sample.pictures, strict=True) if c < most]
        if equal and layer and free:
            assert max(counts) - min(free) <= 1
        before = counts


@pytest.mark.parametrize("name", SEVERAL)
def test_every_family_keeps_equal_quotas_and_equals_the_oracle(name):
    model = model_of(name)
    arguments = zoo.inputs(name, model, "padded3")
    method = AutoPrune(Budget.ratio(0.4), per_picture="equal")
    result = oracle.compare(model, arguments, method, steps=2)
    assert result.worst < 2e-4
    assert [len(sample.pictures) for sample in result.samples] == [1, 1, 2]
    for sample in result.samples:
        check(sample)
        assert sum(sample.tokens_per_layer) == round(zoo.LAYERS * 0.4 * sample.num_visual)


CUTS = [
    {"first_cut": "after_layer_0"},
    {"first_cut": "after_layer_0", "first_ranking": "text+diversity", "rank_every": 1},
    {"first_cut": "pre_llm"},
    {"first_cut": "peek", "mi_layer": "peek", "cut_every": 2},
    {"merger": "summary"},
]


@pytest.mark.parametrize("shared", ["equal", "attention", (3.0, 1.0)])
@pytest.mark.parametrize("options", CUTS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_cut_keeps_the_quotas(options, shared):
    model = model_of("llava")
    arguments = zoo.inputs("llava", model, "padded3", only=2)
    method = AutoPrune(11, per_picture=shared, **options)
    with torch.no_grad(), method(model) as trace:
        model(**arguments)
    (sample,) = trace.samples
    check(sample, equal=shared == "equal" and "merger" not in options)
    assert sum(sample.tokens_per_layer) == 11 * zoo.LAYERS
    if shared == (3.0, 1.0) and "merger" not in options:
        for layer in range(1, zoo.LAYERS):
            first, second = sample.kept_by_picture(layer)
            # (k - 1/2) / 3 and (k - 1/2) / 1 in turn: 3 of the first to one of the second, up to 16.
            least = max(sample.tokens_per_layer[layer] - 16, 0)
            assert abs(second - max((first + second) / 4, least)) <= 1


def test_without_it_one_picture_may_win():
    model = model_of("llava")
    arguments = zoo.inputs("llava", model, "padded3", only=2)
    with torch.no_grad(), AutoPrune(8)(model) as trace:
        model(**arguments)
    counts = [trace.samples[0].kept_by_picture(layer) for layer in range(1, zoo.LAYERS)]
    assert max(abs(first - second) for first, second in counts) > 1


def test_attention_shares_as_the_text_attends():
    model = model_of("llava", "eager")
    arguments = zoo.inputs("llava", model, "padded3", only=2)
    visual = zoo.visual_mask(model, arguments["input_ids"])[0]
    with torch.no_grad():
        attentions = model(**arguments, output_attentions=True).attentions[0][0]
        method = AutoPrune(8, per_picture="attention", first_ranking="text")
        with method(model) as trace:
            model(**arguments)
    (sample,) = trace.samples
    last = int(visual.nonzero()[-1])
    seen = attentions[:, last + 1 :, visual].mean(dim=(0, 1))
    shares = [float(seen[:16].sum()), float(seen[16:].sum())]
    order = slow_order(seen.tolist(), [0] * 16 + [1] * 16, shares)
    assert abs(shares[0] - shares[1]) > 0.1 * sum(shares)
    kept = sorted(order[: sample.tokens_per_layer[1]])
    assert sample.kept[1].tolist() == kept


def test_a_prompt_of_its_own_keeps_its_quotas():
    model = model_of("llava")
    method = AutoPrune(8, per_picture="equal")
    with torch.no_grad(), per_prompt([AutoPrune(8), None, method])(model) as trace:
        model(**zoo.inputs("llava", model, "padded3"))
    check(trace.samples[2])
    with torch.no_grad(), method(model) as alone:
        model(**zoo.inputs("llava", model, "padded3", only=2))
    assert [k.tolist() for k in trace.samples[2].kept] == [
        k.tolist() for k in alone.samples[0].kept
    ]


def test_the_last_token_of_a_prompt_counts_for_its_own_picture():
    model = model_of("llava")
    arguments = zoo.inputs("llava", model, "padded3", only=2)
    last = int(zoo.visual_mask(model, arguments["input_ids"])[0].nonzero()[-1])
    for name in ("input_ids", "attention_mask"):
        arguments[name] = arguments[name][:, : last + 1]
    for budget in range(7, 16):
        with torch.no_grad(), AutoPrune(budget, per_picture="equal", rank_every=1)(model) as trace:
            model(**arguments)
        check(trace.samples[0])
        assert trace.samples[0].kept[-1].tolist()[-1] == 31


def test_shares_must_be_as_many_as_pictures():
    model = model_of("llava")
    method = AutoPrune(8, per_picture=(1, 2))
    expected = r"gives 2 shares, but prompt 0 of the batch has 1 pictures; give one share"
    with pytest.raises(ValueError, match=expected), torch.no_grad(), method(model):
        model(**zoo.inputs("llava", model, "padded3"))


@pytest.mark.parametrize(
    "wrong", ["even", 3, (), [0, 0], [1, -1], [1, float("inf")], ["a"], [True, 1], True]
)
def test_other_values_are_refused(wrong):
    with pytest.raises(ValueError, match='must be "equal", "attention", or the pictures'):
        AutoPrune(8, per_picture=wrong)


def test_clusters_of_several_pictures_are_refused():
    with pytest.raises(ValueError, match="makes tokens of several pictures"):
        AutoPrune(8, per_picture="equal", merger="dpc_knn")


def test_it_is_an_option_on_the_command_line():
    budget = Budget.tokens(8)
    assert build_method("autoprune", budget, {}, ["per_picture=equal"]).per_picture == "equal"
    numbers = build_method("autoprune", budget, {}, ["per_picture=2 1;1"])
    assert numbers.per_picture == (2.0, 1.0, 1.0)
    assert build_method("autoprune", budget, {}, ["per_picture=none"]).per_picture is None
    with pytest.raises(ValueError, match="option per_picture expects"):
        build_method("autoprune", budget, {}, ["per_picture=even"])
