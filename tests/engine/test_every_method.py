"""Every method through the engine: equality with the slow oracle, and what it really spends."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

import autoprune
from autoprune import Budget
from autoprune.errors import UnsupportedError
from autoprune.methods import METHODS
from tests import oracle, zoo
from tests.spy import Spy, for_oracle

TOLERANCE = 3e-4
FAMILIES = ["llava", "qwen2_5_vl", "internvl", "llava_next", "gemma3"]
BATCHES = ["single", "padded3", "padded3_text"]
# Rows that merge behind all others, with compacted positions: checked by the golden traces.
OWN_TESTS = {"autoprune_reference"}
NAMES = [name for name in METHODS if name not in OWN_TESTS]
# Methods whose number of tokens depends on the picture.
DATA_DEPENDENT = {"pact"}
EXACT = {"autoprune"}
model_of = functools.cache(zoo.build)


# As close to the authors' code as the options allow, and a version of it that has no name of its own.
RELEASED = {name: method.released for name, method in METHODS.items() if method.released}
OTHER_VERSIONS = {
    **{f"{name} as released": (name, options) for name, options in RELEASED.items()},
    "sparsevlm, second version": ("sparsevlm", {"version": 2}),
}
COMPACTED = {
    f"{name} compacted": (name, {"positions": "compacted"})
    for name in NAMES
    if name not in RELEASED
}


def created(name, budget):
    """The method with settings that fit the zoo's six layers."""
    options = {"recycle": False} if name == "autoprune_reference" else {}
    if name in OTHER_VERSIONS | COMPACTED:
        name, options = (OTHER_VERSIONS | COMPACTED)[name]
    return autoprune.create(name, budget=budget, **options)


# The engine treats the rows of a batch alike in every family: two are tried in all batches, the others in the
# one with two pictures in a prompt.
@pytest.mark.parametrize(
    ("family", "batch"),
    [
        *itertools.product(zoo.EVERY_MODE, BATCHES),
        *((family, "padded3") for family in FAMILIES if family not in zoo.EVERY_MODE),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_pruning_equals_the_oracle(name, family, batch):
    check_oracle(name, family, batch)


@pytest.mark.parametrize("batch", ["single", "padded3_text"])
@pytest.mark.parametrize("family", ["llava", "internvl"])
@pytest.mark.parametrize("name", OTHER_VERSIONS)
def test_settings_as_released_equal_the_oracle(name, family, batch):
    check_oracle(name, family, batch)


@pytest.mark.parametrize("name", COMPACTED)
def test_every_method_may_number_the_tokens_that_are_left_anew(name):
    check_oracle(name, "llava", "padded3_text")


@pytest.mark.parametrize("name", ["fastervlm", "pdrop"])
def test_positions_of_several_dimensions_are_not_numbered_anew(name):
    method = autoprune.create(name, Budget.ratio(0.5), positions="compacted")
    with pytest.raises(UnsupportedError, match="use positions='original'"):
        method(model_of("qwen2_5_vl", "sdpa"))


def check_oracle(name, family, batch):
    model = model_of(family, zoo.FAMILIES[family].attentions[0])
    inputs = zoo.inputs(family, model, batch)
    spy = Spy(created(name, Budget.ratio(0.5)))
    with spy(model) as trace:
        logits, tokens = oracle.generate_logits(model, inputs, steps=2)
    (decisions,) = spy.decisions
    visual = zoo.visual_mask(model, inputs["input_ids"])
    kept, states = for_oracle(decisions, inputs, visual, zoo.LAYERS)
    expected = oracle.oracle_logits(model, inputs, kept, tokens[:, :2], spy.positions, states)
    assert (logits - expected).abs().max() < TOLERANCE
    plain = oracle.plain_logits(model, inputs)
    for row, sample in enumerate(trace.samples):
        counts = [int((kept[layer][row] & visual[row]).sum()) for layer in range(zoo.LAYERS)]
        assert counts == sample.tokens_per_layer
        assert sum(counts) <= round(0.5 * zoo.LAYERS * sample.num_visual)
        if sample.num_visual:
            assert (expected[row, 0] - plain[row, 0]).abs().max() > 0.1


@pytest.mark.parametrize(
    "budget",
    [
        Budget.ratio(0.5),
        Budget.ratio(0.34),
        Budget.tokens(9),
        Budget.tokens(7, counted="leaving"),
        Budget.flops(0.6),
        Budget.kv_bytes(9_000),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", [*METHODS, *OTHER_VERSIONS])
def test_every_method_spends_the_budget_it_reports(name, budget):
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3_text")
    found = prefill_or_refusal(model, name, budget, inputs)
    if isinstance(found, Exception):
        assert isinstance(found, ValueError) and "budget" in str(found)
        return
    samples, cache = found
    assert len(samples) == len(inputs["attention_mask"])
    for sample in samples:
        counts, kept = sample.tokens_per_layer, sample.kept
        assert counts == sorted(counts, reverse=True)
        assert all(len(k) <= n for k, n in zip(kept, counts, strict=True))
        if not sample.num_visual:
            assert counts == [0] * zoo.LAYERS
            continue
        assert spent(sample, budget) <= allowed(sample, budget)
        if name in EXACT and budget.kind in ("tokens", "ratio"):
            assert spent(sample, budget) == allowed(sample, budget)
        if name not in DATA_DEPENDENT:
            assert counts == sample.schedule
    held = [layer.keys.shape[-2] for layer in cache.layers]
    longest = [
        max(s.tokens_per_layer[layer] + s.num_text for s in samples) for layer in range(zoo.LAYERS)
    ]
    assert held == longest, "the cache holds what the trace says"
    assert samples[0].flops < samples[0].flops_full


def prefill_or_refusal(model, name, budget, inputs):
    """Samples and cache of one pruned forward, or the error with which it is refused."""
    try:
        with torch.no_grad(), created(name, budget)(model) as trace:
            cache = model(**inputs, use_cache=True).past_key_values
    except (UnsupportedError, ValueError) as refused:
        return refused
    return trace.samples, cache


def spent(sample, budget):
    counts = sample.tokens_per_layer
    if budget.kind == "flops":
        return sample.flops
    if budget.kind == "kv_bytes":
        return sample.kv_bytes
    return sum(counts[1:]) + counts[-1] if budget.counted == "leaving" else sum(counts)


def allowed(sample, budget):
    if budget.kind == "flops":
        return budget.value * sample.flops_full
    if budget.kind == "kv_bytes":
        return budget.value
    return round(zoo.LAYERS * budget.value * (sample.num_visual if budget.kind == "ratio" else 1))


# A random draw belongs to the place in the batch.
@pytest.mark.parametrize("name", [name for name in (*NAMES, *OTHER_VERSIONS) if name != "random"])
def test_a_prompt_gets_in_a_batch_what_it_gets_alone(name):
    # Through generate, which does not count padding as positions: DART measures rotated keys.
    model = model_of("llava", "eager")
    with created(name, Budget.ratio(0.5))(model) as trace:
        oracle.generate_logits(model, zoo.inputs("llava", model, "padded3_text"), steps=1)
        for row in range(3):
            alone = zoo.inputs("llava", model, "padded3_text", only=row)
            oracle.generate_logits(model, alone, steps=1)
    together, alone = trace.samples[:3], trace.samples[3:]
    for first, second in zip(together, alone, strict=True):
        assert first.tokens_per_layer == second.tokens_per_layer
        assert [k.tolist() for k in first.kept] == [k.tolist() for k in second.kept]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "no_image"])
def test_a_budget_of_everything_changes_no_bit(name):
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3_text")
    with torch.no_grad():
        plain = model(**inputs).logits
        with created(name, 1000)(model) as trace:
            whole = model(**inputs).logits
    assert torch.equal(whole, plain)
    assert all(s.tokens_per_layer == [s.num_visual] * zoo.LAYERS for s in trace.samples)


@pytest.mark.parametrize("family", [name for name in zoo.FAMILIES if name not in FAMILIES])
@pytest.mark.parametrize("name", NAMES)
def test_every_method_runs_on_every_other_family_or_says_what_is_missing(name, family):
    model = model_of(family, zoo.FAMILIES[family].attentions[0])
    inputs = zoo.inputs(family, model, "padded3")
    found = prefill_or_refusal(model, name, Budget.ratio(0.5), inputs)
    if isinstance(found, Exception):
        assert "vision" in str(found), "only the vision tower differs that much between families"
        return
    for sample in found[0]:
        assert sum(sample.tokens_per_layer) <= round(0.5 * zoo.LAYERS * sample.num_visual)
