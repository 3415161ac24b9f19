"""A method for each prompt of a batch: every prompt keeps what it keeps alone."""

from __future__ import annotations

import functools
import json
from dataclasses import fields, replace
from typing import ClassVar

import pytest
import torch
from transformers import DynamicCache

import autoprune
from autoprune import AutoPrune, AutoPruneReference, Budget, per_prompt
from autoprune.contract import Observation, Tower
from autoprune.errors import UnsupportedError
from autoprune.methods.fastv import FastV
from autoprune.methods.hiprune import HiPrune
from autoprune.methods.pact import PACT
from autoprune.methods.pdrop import PDrop
from autoprune.methods.side_by_side import ASKED
from autoprune.methods.sparsevlm import SparseVLM
from autoprune.methods.tome import ToMe
from autoprune.methods.visionzip import VisionZip
from autoprune.policy.budget import InfeasibleBudget
from tests import oracle, zoo
from tests.engine.test_ends_with_picture import ending
from tests.engine.test_every_method import NAMES, TOLERANCE
from tests.scattered import Scattered
from tests.spy import Spy, for_oracle

model_of = functools.cache(zoo.build)
STEPS = 2


@pytest.fixture
def merges_at_the_end(monkeypatch):
    """ToMe and Turbo merge in the tower if alone, which other methods' prompts could not go along with."""
    monkeypatch.setattr(ToMe, "sees", Tower(attention=True, keys=True))


def whole_or(method):
    """A method that runs alone; None is one that keeps everything."""
    return Scattered(schedules=({},)) if method is None else method


def same_as_alone(model, family, batch, methods):
    """Compare a batch with each of its prompts alone; the samples of the batch."""
    inputs = zoo.inputs(family, model, batch)
    with per_prompt(methods)(model) as trace:
        together, tokens = oracle.generate_logits(model, inputs, STEPS)
    for row, method in enumerate(methods):
        alone = zoo.inputs(family, model, batch, only=row)
        with whole_or(method)(model) as own:
            logits, own_tokens = oracle.generate_logits(model, alone, STEPS)
        (expected,), sample = own.samples, trace.samples[row]
        assert [k.tolist() for k in sample.kept] == [k.tolist() for k in expected.kept]
        assert sample.tokens_per_layer == expected.tokens_per_layer
        assert sample.mutual_information == pytest.approx(expected.mutual_information, abs=1e-5)
        if method is not None:
            assert sample.schedule == expected.schedule
        assert own_tokens[0].tolist() == tokens[row].tolist()
        assert (logits[0] - together[row]).abs().max() < TOLERANCE
    return trace.samples


def same_as_the_oracle(model, family, batch, methods):
    inputs = zoo.inputs(family, model, batch)
    spy = Spy(per_prompt(methods))
    with spy(model) as trace:
        logits, tokens = oracle.generate_logits(model, inputs, STEPS)
    (decisions,) = spy.decisions
    visual = zoo.visual_mask(model, inputs["input_ids"])
    kept, states = for_oracle(decisions, inputs, visual, zoo.LAYERS)
    expected = oracle.oracle_logits(model, inputs, kept, tokens[:, :STEPS], spy.positions, states)
    assert (logits - expected).abs().max() < TOLERANCE
    for row, sample in enumerate(trace.samples):
        counts = [int((kept[layer][row] & visual[row]).sum()) for layer in range(zoo.LAYERS)]
        assert counts == sample.tokens_per_layer


@pytest.mark.parametrize("name", NAMES)
def test_each_method_beside_autoprune(name, merges_at_the_end):
    model = model_of("llava", "eager")
    methods = [
        autoprune.create(name, Budget.ratio(0.5)),
        AutoPrune(Budget.ratio(0.4)),
        autoprune.create(name, Budget.ratio(0.6)),
    ]
    samples = same_as_alone(model, "llava", "padded3", methods)
    same_as_the_oracle(model, "llava", "padded3", methods)
    assert sum(samples[1].tokens_per_layer) == round(0.4 * zoo.LAYERS * samples[1].num_visual)


MIXES = {
    "a whole prompt": [AutoPrune(Budget.ratio(0.4)), None, FastV(Budget.ratio(0.5))],
    "budgets": [
        AutoPrune(Budget.ratio(0.4)),
        AutoPrune(Budget.ratio(0.8)),
        AutoPrune(Budget.flops(0.85)),
    ],
    "the layer before and the one behind": [
        FastV(Budget.ratio(0.5)),
        PDrop(Budget.ratio(0.6)),
        AutoPrune(Budget.ratio(0.5)),
    ],
    "merged tokens and new states": [
        AutoPrune(Budget.ratio(0.5), merger="dpc_knn"),
        Scattered(schedules=({1: 0.6, 3: 0.3},)),
        replace(VisionZip(Budget.ratio(0.3)), contextual=0.5),
    ],
    "merging beside merging": [
        SparseVLM(Budget.ratio(0.4)),
        AutoPrune(Budget.ratio(0.5), merger="dpc_knn"),
        SparseVLM(Budget.ratio(0.6), recycle=False),
    ],
    "one loses all": [
        Scattered(schedules=({0: 0.5, 3: 0.0},)),
        autoprune.create("no_image", 4),
        HiPrune(Budget.ratio(0.5)),
    ],
    "equal methods": [
        FastV(Budget.ratio(0.5)),
        AutoPrune(Budget.ratio(0.5)),
        FastV(Budget.ratio(0.5)),
    ],
}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next", "gemma3"])
@pytest.mark.parametrize("batch", ["padded3", "padded3_text"])
@pytest.mark.parametrize("mix", MIXES)
def test_a_prompt_keeps_what_it_keeps_alone(mix, batch, family):
    model = model_of(family, zoo.FAMILIES[family].attentions[0])
    methods = MIXES[mix]
    if any(isinstance(method, HiPrune) for method in methods) and family != "llava":
        pytest.skip("the tower of this family does not show what HiPrune needs")
    same_as_alone(model, family, batch, methods)
    same_as_the_oracle(model, family, batch, methods)


SIZED = {
    "at different cuts": [
        VisionZip(Budget.ratio(0.4), proportional=True),
        autoprune.create("pact", Budget.ratio(0.5), proportional=True),
        SparseVLM(Budget.ratio(0.5), proportional=True),
    ],
    "beside none": [
        AutoPrune(Budget.ratio(0.5)),
        autoprune.create("pact", Budget.ratio(0.5), proportional=True),
        None,
    ],
}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("batch", ["padded3", "padded3_text"])
@pytest.mark.parametrize("mix", SIZED)
def test_a_prompts_tokens_count_for_what_they_count_for_alone(mix, batch, family):
    same_as_alone(model_of(family, "sdpa"), family, batch, SIZED[mix])


PAIR = [AutoPrune(Budget.ratio(0.4)), FastV(Budget.ratio(0.6)), None]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "use_cache": False}])
def test_beams_keep_what_their_prompt_keeps(options):
    model = model_of("llava", "sdpa")
    copies = options["num_beams"]
    with per_prompt(PAIR)(model) as trace:
        together = model.generate(
            **zoo.inputs("llava", model, "padded3"), max_new_tokens=3, min_new_tokens=3, **options
        )
        samples = trace.samples[: 3 * copies]
    for row, method in enumerate(PAIR):
        alone = zoo.inputs("llava", model, "padded3", only=row)
        with whole_or(method)(model) as own:
            expected = model.generate(**alone, max_new_tokens=3, min_new_tokens=3, **options)
        assert together[row, -3:].tolist() == expected[0, -3:].tolist()
        for copy in range(copies):
            sample = samples[copies * row + copy]
            assert [k.tolist() for k in sample.kept] == [k.tolist() for k in own.samples[0].kept]


def test_several_answers_of_each_prompt():
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3")
    with per_prompt(PAIR)(model) as trace:
        model.generate(**inputs, max_new_tokens=2, do_sample=True, num_return_sequences=2)
        # What one generation repeats is no business of the next forward.
        with torch.no_grad():
            model(**inputs)
    with per_prompt(PAIR)(model) as once, torch.no_grad():
        model(**inputs)
    counts = [sample.tokens_per_layer for sample in once.samples]
    repeated = [counts[row] for row in (0, 0, 1, 1, 2, 2)]
    assert [sample.tokens_per_layer for sample in trace.samples] == repeated + counts


def test_a_batch_of_another_size_is_refused():
    model = model_of("llava", "sdpa")
    three = zoo.inputs("llava", model, "padded3")
    with per_prompt([AutoPrune(8), FastV(8)])(model) as trace:
        for run in (model, functools.partial(model.generate, max_new_tokens=1)):
            with pytest.raises(ValueError, match="2 methods, but the batch has 3 prompts"):
                run(**three)
        # Twice as many prompts are no copies of prompts.
        row = zoo.inputs("llava", model, "single")
        four = {name: torch.cat([value] * 4) for name, value in row.items()}
        with pytest.raises(ValueError, match="2 methods, but the batch has 4 prompts"):
            model(**four)
        with pytest.raises(ValueError, match="2 methods, but the batch has 4 prompts"):
            model.generate(**four, max_new_tokens=1, num_beams=2)
    assert not trace.samples


def test_an_infeasible_budget_names_its_prompts():
    model = model_of("llava", "sdpa")
    methods = [FastV(1), None, FastV(1)]
    with per_prompt(methods)(model), pytest.raises(InfeasibleBudget) as refused:
        model(**zoo.inputs("llava", model, "padded3"))
    assert str(refused.value).startswith(
        "fastv cannot prune prompt 0, 2 of the batch: the smallest feasible budget here is"
    )
    assert refused.value.asked == Budget.tokens(1)


class Counted(FastV):
    """Counts how often it is asked."""

    asked: ClassVar[list[list[int]]] = []

    def choose(self, seen, counts, state):
        self.asked.append(list(counts))
        return super().choose(seen, counts, state)


def test_equal_methods_are_asked_once():
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3")
    half, less = Counted(Budget.ratio(0.5)), Counted(Budget.ratio(0.4))
    with torch.no_grad(), half(model) as trace:
        expected = model(**inputs).logits
    Counted.asked.clear()
    with torch.no_grad(), per_prompt([half, replace(half), Counted(half.budget)])(model) as mixed:
        assert torch.equal(model(**inputs).logits, expected)
    assert len(Counted.asked) == 1 and len(Counted.asked[0]) == 3
    assert mixed.summary() == trace.summary()
    Counted.asked.clear()
    with torch.no_grad(), per_prompt([half, less, half])(model):
        model(**inputs)
    assert [len(counts) for counts in Counted.asked] == [2, 1]


def test_budgets_by_name():
    mixed = AutoPrune.per_prompt([16, None, Budget.ratio(0.5)], k0=0.2)
    assert mixed == per_prompt([AutoPrune(16, k0=0.2), None, AutoPrune(Budget.ratio(0.5), k0=0.2)])
    with pytest.raises(ValueError, match="list with one budget for each prompt"):
        AutoPrune.per_prompt(16)


def test_the_trace_says_what_each_method_planned(tmp_path):
    model = model_of("llava", "sdpa")
    methods = [Scattered(), AutoPrune(Budget.ratio(0.5)), None]
    with torch.no_grad(), per_prompt(methods)(model) as trace:
        model(**zoo.inputs("llava", model, "padded3"))
    unplanned, planned, whole = trace.samples
    assert unplanned.schedule is None and unplanned.mutual_information is None
    assert planned.schedule == planned.tokens_per_layer and planned.mutual_information > 0
    assert whole.schedule == [whole.num_visual] * zoo.LAYERS and whole.mutual_information is None
    trace.to_json(tmp_path / "trace.json")
    written = json.loads((tmp_path / "trace.json").read_text())["samples"]
    assert [sample["schedule"] for sample in written] == [None, planned.schedule, whole.schedule]


def test_all_prompts_whole_changes_no_bit():
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3")
    with torch.no_grad():
        plain = model(**inputs).logits
        with per_prompt([None] * 3)(model) as trace:
            assert torch.equal(model(**inputs).logits, plain)
    assert all(s.tokens_per_layer == [s.num_visual] * zoo.LAYERS for s in trace.samples)


def test_compacted_positions_side_by_side():
    model = model_of("llava", "sdpa")
    same_as_alone(model, "llava", "padded3", [AutoPruneReference(9), None, AutoPruneReference(14)])
    compacted = AutoPrune(Budget.ratio(0.5), positions="compacted")
    same_as_the_oracle(model, "llava", "padded3", [compacted, None, replace(compacted, budget=10)])


def test_a_tower_merges_for_methods_that_differ_in_their_budgets_only():
    tome = ToMe(Budget.ratio(0.5))
    assert per_prompt([tome, ToMe(4)]).tower().merge
    assert not per_prompt([tome, None]).tower().merge
    assert not per_prompt([tome, FastV(4)]).tower().merge
    assert not per_prompt([tome, ToMe(4, rounds=3)]).tower().merge
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3")
    logits = {}
    for share in (0.3, 0.5):
        methods = [replace(tome, budget=Budget.ratio(share)), tome, tome]
        with torch.no_grad(), per_prompt(methods)(model) as trace:
            logits[share] = model(**inputs).logits[:, -1]
        first = trace.samples[0]
        assert first.mean_tokens == int(share * first.num_visual)
    # The largest share decides what the tower leaves, as in any batch of ToMe.
    torch.testing.assert_close(logits[0.3][1:], logits[0.5][1:])
    assert (logits[0.3][0] - logits[0.5][0]).abs().max() > 0.1


def test_a_static_cache_has_room_for_the_method_that_keeps_most():
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3")
    mixed = per_prompt([AutoPrune(Budget.ratio(0.4)), FastV(Budget.ratio(0.6)), AutoPrune(8)])
    sizes = [int(n) for n in zoo.visual_mask(model, inputs["input_ids"]).sum(dim=1)]
    text = max(int(inputs["input_ids"].shape[1]) - max(sizes), 16)
    with mixed(model):
        expected, _ = oracle.generate_logits(model, inputs, STEPS)
    handle = mixed.attach(model)
    try:
        cache = handle.static_cache(sizes, text, STEPS + 1)
        logits, _ = oracle.generate_logits(model, inputs, STEPS, past_key_values=cache)
    finally:
        handle.detach()
    assert (logits - expected).abs().max() < TOLERANCE
    rooms = [m.capacity(zoo.LAYERS, max(sizes)) for m in mixed.methods]
    assert mixed.capacity(zoo.LAYERS, max(sizes)) == [
        max(room) for room in zip(*rooms, strict=True)
    ]


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ([16, 48], r"got 16; for budgets, AutoPrune.per_prompt\(\[16, 48\]\)"),
        (AutoPrune(16), "a list with one method for each prompt"),
        ([], "a list with one method for each prompt"),
        ([per_prompt([None])], "got another per_prompt"),
        ([AutoPrune(16), AutoPruneReference(16)], "must agree in their positions"),
        ([HiPrune(16), HiPrune(16, middle=1.0)], "different blocks in the middle"),
    ],
)
def test_what_cannot_run_side_by_side_is_refused(methods, said):
    with pytest.raises(ValueError, match=said):
        per_prompt(methods)


def test_each_method_is_checked_against_the_model():
    with pytest.raises(ValueError, match="mi_layer is 5, but the model has 6 layers"):
        per_prompt([AutoPrune(4), AutoPrune(4, mi_layer=5)])(model_of("llava", "sdpa"))
    with pytest.raises(UnsupportedError, match="one-dimensional rotary positions"):
        per_prompt([AutoPrune(4, positions="compacted")])(model_of("qwen2_5_vl", "sdpa"))


def bordered():
    """Pictures whose upper and lower thirds are of one colour, as padding is."""
    inputs = zoo.inputs("llava", model_of("llava", "eager"), "padded3")
    for rows in (slice(None, 21), slice(-21, None)):
        inputs["pixel_values"][:, :, rows] = 0.25
    return inputs


@pytest.mark.parametrize("beside", [None, AutoPrune(Budget.ratio(0.5))], ids=["whole", "other"])
def test_padding_of_pictures_is_shown_beside_other_methods(beside):
    model, method = model_of("llava", "eager"), HiPrune(Budget.ratio(0.5))
    with torch.no_grad():
        with method(model) as alone:
            model(**bordered())
        with per_prompt([method, beside, method])(model) as mixed:
            model(**bordered())
    for row in (0, 2):
        kept = [trace.samples[row].kept[0].tolist() for trace in (alone, mixed)]
        assert kept[0] == kept[1]


def test_what_lies_outside_of_a_squared_picture_is_shown_to_a_list_of_methods():
    model, method = model_of("llava", "eager"), AutoPruneReference(8)
    with torch.no_grad():
        with method(model) as alone:
            model(**bordered())
        with per_prompt([method] * 3)(model) as listed:
            model(**bordered())
    for own, sample in zip(alone.samples, listed.samples, strict=True):
        assert [k.tolist() for k in own.kept] == [k.tolist() for k in sample.kept]


def test_nothing_that_a_method_may_ask_of_the_tower_is_forgotten():
    everything = {field.name: True for field in fields(Tower)} | {"middle": 0.5, "merge": False}

    class Asks(FastV):
        def tower(self):
            return Tower(**everything)

    assert per_prompt([Asks(8), None, FastV(8)]).tower() == Tower(**everything)
    shown = {field.name for field in fields(Observation) if field.name.startswith("vision_")}
    assert set(ASKED) == shown | {"places"}


@pytest.mark.parametrize("layer", [12, 18])
def test_states_and_merged_tokens_of_prompts_that_end_with_their_picture(layer):
    model, ends = model_of("llava", "eager"), (0, 2)
    released, pact = (
        AutoPruneReference(6),
        PACT(Budget.ratio(0.6), layer=layer, positions="compacted"),
    )
    methods, inputs = [released, pact, released], ending("llava", model, rows=ends)
    with per_prompt(methods)(model) as trace:
        together, _ = oracle.generate_logits(model, inputs, STEPS)
    pictures = zoo.inputs("llava", model, "padded3")["pixel_values"].split([1, 1, 2])
    for row, method in enumerate(methods):
        real = inputs["attention_mask"][row].bool()
        alone = {name: inputs[name][row, real][None] for name in ("input_ids", "attention_mask")}
        with method(model) as own:
            logits, _ = oracle.generate_logits(
                model, alone | {"pixel_values": pictures[row]}, STEPS
            )
        assert own.samples[0].tokens_per_layer == trace.samples[row].tokens_per_layer
        assert (logits[0] - together[row]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "method",
    [PDrop(Budget.ratio(0.5)), per_prompt([FastV(16), PDrop(16), AutoPrune(16)])],
    ids=["alone", "mixed"],
)
def test_looking_ahead_on_a_cache_that_makes_its_layers_when_they_come(method):
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3")
    with method(model), torch.no_grad():
        expected = model(**inputs).logits
        actual = model(**inputs, past_key_values=DynamicCache(), use_cache=True).logits
    assert torch.equal(actual, expected)
