"""A first cut before layer 0 by that layer's own attention: what it keeps, what it computes, what it leaves."""

from __future__ import annotations

import functools
import itertools
import threading
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import autoprune
from autoprune import AutoPrune, Budget, Fleet
from autoprune.bench.launches import Launches
from autoprune.contract import Needs, Observation
from autoprune.engine.attention.ahead import has_own_projections
from autoprune.engine.locate import locate
from autoprune.methods.base import Planned
from autoprune.parts.selectors import relevance_and_diversity
from autoprune.policy.time_model import DeviceSpeed
from tests import oracle, zoo, zoo_decoders
from tests.engine.test_ends_with_picture import ending
from tests.engine.test_oracle_equality import hooks_of

TOLERANCE = 2e-4
RATIO = Budget.ratio(0.3)
METHOD = AutoPrune(RATIO, first_cut="peek")
BATCHES = ["single", "padded3", "padded3_text"]
SETTINGS = [
    pytest.param(name, attention, media, id=f"{name}-{attention}-{media}")
    for name, family in zoo.FAMILIES.items()
    for attention in family.attentions
    for media in family.media
]
model_of = functools.cache(zoo.build)


def attention_of_layer_0(plain, inputs):
    """From a plain eager forward: the text's attention on each visual token, mean over heads and text."""
    visual = zoo.visual_mask(plain, inputs["input_ids"])
    with torch.no_grad():
        maps = plain(**inputs, use_cache=False, output_attentions=True).attentions[0]
    scores = []
    for row, real in enumerate(inputs["attention_mask"].bool()):
        columns, own = real.nonzero().squeeze(1), visual[row].nonzero().squeeze(1)
        if not len(own):
            scores.append(torch.zeros(0))
            continue
        text = columns[columns > own[-1]]
        text = text if len(text) else columns[-1:]
        scores.append(maps[row][:, text][..., own].mean(dim=(0, 1)))
    return scores


def best(scores, number, always=()):
    """The indices of the highest scores, ascending, those in `always` among them."""
    order = sorted(range(len(scores)), key=lambda i: (i not in always, -float(scores[i])))
    return sorted(order[:number])


def assert_kept_by_layer_0(samples, scores, always=lambda sample: ()):
    for sample, own in zip(samples, scores, strict=True):
        if sample.num_visual:
            number = sample.tokens_per_layer[0]
            assert 0 < number < sample.num_visual
            assert sample.kept[0].tolist() == best(own, number, always(sample))


@pytest.mark.parametrize("batch", ["padded3_text"])
@pytest.mark.parametrize(("name", "attention", "media"), SETTINGS)
def test_it_keeps_what_the_text_attends_to_and_equals_the_oracle(name, attention, media, batch):
    model = model_of(name, attention)
    inputs = zoo.inputs(name, model, batch, media)
    oracle.plain_logits(model, inputs)  # transformers installs hooks of its own on first use
    hooks = hooks_of(model)
    result = oracle.compare(model, inputs, METHOD, steps=3)
    assert result.worst < TOLERANCE
    assert hooks_of(model) == hooks
    assert_kept_by_layer_0(result.samples, attention_of_layer_0(model_of(name, "eager"), inputs))
    for sample in result.samples:
        assert sum(sample.tokens_per_layer) == round(0.3 * zoo.LAYERS * sample.num_visual)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_a_plain_forward_with_padding_on_either_side(name, padding_side):
    attention = zoo.FAMILIES[name].attentions[0]
    model, plain = model_of(name, attention), model_of(name, "eager")
    inputs = zoo.inputs(name, model, "padded3", padding_side=padding_side)
    with METHOD(model) as trace, torch.no_grad():
        actual = model(**inputs).logits
    assert_kept_by_layer_0(trace.samples, attention_of_layer_0(plain, inputs))
    mask = inputs["attention_mask"]
    columns = oracle.columns_from_trace(trace.samples, mask, zoo.LAYERS)
    alive = columns[-1] & mask.bool()
    expected = oracle.oracle_forward(model, inputs, columns)
    torch.testing.assert_close(actual[alive], expected[alive], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", ["llava", "internvl", "llava_sliding", "paligemma"])
def test_compacted_positions_equal_the_oracle(name, batch):
    model = model_of(name, zoo.FAMILIES[name].attentions[0])
    inputs = zoo.inputs(name, model, batch)
    method = AutoPrune(RATIO, first_cut="peek", positions="compacted")
    result = oracle.compare(model, inputs, method, steps=3)
    assert result.worst < TOLERANCE
    assert_kept_by_layer_0(result.samples, attention_of_layer_0(model_of(name, "eager"), inputs))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_prompts_that_end_with_their_picture_look_from_its_last_token(name, side):
    model = model_of(name, "eager")
    inputs = ending(name, model, side=side)
    with METHOD(model) as trace, torch.no_grad():
        model(**inputs)
    visual, mask = zoo.visual_mask(model, inputs["input_ids"]), inputs["attention_mask"].bool()

    def always(sample):
        row = next(i for i, other in enumerate(trace.samples) if other is sample)
        last = mask[row].nonzero().max()
        return (sample.num_visual - 1,) if visual[row, last] else ()

    assert_kept_by_layer_0(trace.samples, attention_of_layer_0(model, inputs), always)
    for sample in trace.samples:
        assert sum(sample.tokens_per_layer) == round(0.3 * zoo.LAYERS * sample.num_visual)


@pytest.mark.parametrize("batch", ["single", "padded3"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_static_cache_has_room_for_it(name, batch):
    model = model_of(name, "sdpa")
    inputs = zoo.inputs(name, model, batch)
    visual = zoo.visual_mask(model, inputs["input_ids"]).sum(dim=1)
    text = inputs["attention_mask"].sum(dim=1) - visual
    with (pruning := METHOD(model)) as trace:
        cache = pruning.static_cache(visual.tolist(), int(text.max()), 4)
        actual, tokens = oracle.generate_logits(model, inputs, 3, past_key_values=cache)
    columns = oracle.columns_from_trace(trace.samples, inputs["attention_mask"], zoo.LAYERS)
    expected = oracle.oracle_logits(model, inputs, columns, tokens[:, :3])
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)
    assert_kept_by_layer_0(trace.samples, attention_of_layer_0(model_of(name, "eager"), inputs))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_compiled_layers_are_looked_at_as_they_are(name):
    model = model_of(name, "sdpa")
    inputs = zoo.inputs(name, model, "padded3")
    with METHOD(model) as trace:
        expected, _ = oracle.generate_logits(model, inputs, steps=2)
    handle = METHOD.attach(model)
    handle.compile_prefill("eager")
    logits, _ = oracle.generate_logits(model, inputs, steps=2)
    handle.detach()
    for sample, other in zip(handle.trace.samples, trace.samples, strict=True):
        assert [k.tolist() for k in sample.kept] == [k.tolist() for k in other.kept]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", zoo_decoders.DECODERS)
def test_decoders_with_attention_of_another_kind(kind, batch):
    model, plain = (zoo_decoders.build(kind, backend) for backend in ("sdpa", "eager"))
    assert has_own_projections(locate(model).attentions[0]) == (kind == "diffllama")
    inputs = zoo.inputs("llava", model, batch)
    result = oracle.compare(model, inputs, METHOD, steps=3)
    assert result.worst < TOLERANCE
    assert_kept_by_layer_0(result.samples, attention_of_layer_0(plain, inputs))


@pytest.mark.parametrize("name", ["phi3", "glm4"])
def test_joined_projections_are_looked_at_as_a_whole(name):
    family = zoo.Family(
        lambda: zoo_decoders.llava(name), zoo.FAMILIES["llava"].model, zoo.FAMILIES["llava"].image
    )
    model = zoo.build_family(family)
    assert has_own_projections(locate(model).attentions[0]) == (name == "glm4")
    inputs = zoo.inputs("llava", model, "padded3")
    result = oracle.compare(model, inputs, METHOD, steps=3)
    assert result.worst < TOLERANCE
    plain = zoo.build_family(family, "eager")
    assert_kept_by_layer_0(result.samples, attention_of_layer_0(plain, inputs))


def test_every_family_of_the_zoo_has_projections_that_can_be_left_out():
    """Except CogVLM: each of its experts makes queries, keys and values at once."""
    for name, family in zoo.FAMILIES.items():
        located = locate(model_of(name, family.attentions[0]))
        own = [has_own_projections(attention) for attention in located.attentions]
        assert own == [name != "cogvlm"] * len(own), name


# What it costs.


TEXT_AHEAD = Needs(rows="text", ahead=True)


@dataclass(frozen=True)
class Look(Planned):
    """Looks ahead before one layer, by need, and keeps everything."""

    cut: int = 0
    looked_at: Needs = TEXT_AHEAD
    shown: list[Observation] = field(default_factory=list)

    def shape(self, setting, num_visual, num_layers):
        return [num_visual] * num_layers

    def needs(self, cut, state):
        return self.looked_at if cut == self.cut else None

    def select(self, seen, state):
        self.shown.append(seen)


@torch.no_grad()
def counted(model, inputs):
    """FLOPs inside the decoder. Fused attention hides its products from the counter, MATH does not."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs, logits_to_keep=1)
    modules = counter.get_flop_counts().items()
    return next(sum(n.values()) for name, n in modules if name.endswith("model.language_model"))


@pytest.mark.parametrize("cut", [0, 2])
@pytest.mark.parametrize("rows", ["text", "last"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_look_projects_all_keys_the_rows_queries_and_one_value(name, rows, cut):
    model = model_of(name, "sdpa")
    inputs = zoo.inputs(name, model, "single")
    visual = int(zoo.visual_mask(model, inputs["input_ids"]).sum())
    length = inputs["input_ids"].shape[1]
    columns = zoo.visual_mask(model, inputs["input_ids"])[0].nonzero()
    text = length - 1 - int(columns.max()) if rows == "text" else 1
    assert 0 < text < length - visual or rows == "last"
    plain = counted(model, inputs)
    with Look(Budget.ratio(1.0), cut=cut, looked_at=Needs(rows=rows, ahead=True))(model) as trace:
        looked = counted(model, inputs)
    # Multiplications and additions: keys of all tokens, queries of the rows, one value, scores.
    keys = 2 * zoo.HIDDEN * 2 * zoo.HEAD_DIM * (length + 1)
    queries = 2 * zoo.HIDDEN * zoo.HEADS * zoo.HEAD_DIM * text
    scores = 2 * zoo.HEADS * zoo.HEAD_DIM * text * length
    assert looked - plain == keys + queries + scores
    (sample,) = trace.samples
    assert sample.flops_ahead == looked - plain
    assert sample.flops == sample.flops_full
    saved = trace.summary().flops_saved
    assert saved == pytest.approx(-(looked - plain) / sample.flops_full)


def test_where_keys_are_asked_for_all_queries_are_projected():
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "single")
    length = inputs["input_ids"].shape[1]
    plain = counted(model, inputs)
    with Look(Budget.ratio(1.0), looked_at=Needs(keys=True, ahead=True))(model) as trace:
        looked = counted(model, inputs)
    wanted = 2 * zoo.HIDDEN * zoo.HEAD_DIM * ((2 + zoo.HEADS) * length + 2)
    assert looked - plain == wanted == trace.samples[0].flops_ahead


@pytest.mark.parametrize("batch", ["single", "padded3_text"])
@pytest.mark.parametrize(("first", "other"), [("text", "last"), ("last", "text"), ("last", "all")])
def test_looks_at_rows_of_two_kinds_show_each_as_if_it_were_alone(first, other, batch):
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, batch)
    shown = []
    for needs in (
        Needs(rows=first, ahead=True, beside=Needs(rows=other, ahead=True)),
        Needs(rows=first, ahead=True),
        Needs(rows=other, ahead=True),
    ):
        method = Look(Budget.ratio(1.0), looked_at=needs)
        with method(model), torch.no_grad():
            model(**inputs)
        shown += method.shown
    both, one, another = shown
    torch.testing.assert_close(both.attention, one.attention)
    torch.testing.assert_close(both.beside.attention, another.attention)


def test_each_prompt_of_a_batch_is_charged_its_own_tokens():
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3_text")
    with METHOD(model) as together, torch.no_grad():
        model(**inputs)
    with METHOD(model) as alone, torch.no_grad():
        for row in range(3):
            model(**zoo.inputs("llava", model, "padded3_text", only=row))
    charged = [sample.flops_ahead for sample in together.samples]
    assert charged[::2] == [sample.flops_ahead for sample in alone.samples][::2]
    assert min(charged[::2]) > 0


def test_other_methods_that_look_ahead_are_charged_at_every_look():
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3")
    with autoprune.create("pdrop", Budget.ratio(0.5))(model) as trace, torch.no_grad():
        model(**inputs)
    cost = locate(model).cost
    for sample in trace.samples:
        counts = sample.tokens_per_layer
        before = [a for a, b in itertools.pairwise(counts) if b < a]
        assert len(before) == 3
        wanted = sum(cost.look_flops(n + sample.num_text, 1, 1, 1) for n in before)
        assert sample.flops_ahead == wanted


@pytest.mark.parametrize(("name", "kernels"), [("llava", 29), ("qwen2_5_vl", 29), ("gemma3", 43)])
def test_what_a_peek_launches(name, kernels):
    model = model_of(name, "sdpa")
    inputs = zoo.inputs(name, model, "single")
    seen = []
    for cut in (0, zoo.LAYERS):
        with Look(Budget.ratio(1.0), cut=cut)(model), torch.no_grad():
            model(**inputs)
            with Launches() as launched:
                model(**inputs)
        seen.append(launched)
    looked, plain = seen
    more = looked.seen - plain.seen
    assert more["mm"] + more["addmm"] == 3, "keys, queries and a value"
    assert looked.total - plain.total <= kernels


# Nobody else notices.


def test_a_look_is_the_same_as_one_that_projects_everything(monkeypatch):
    inputs, kept = zoo.inputs("llava", model_of("llava", "sdpa"), "padded3"), []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr("autoprune.engine.prefill.has_own_projections", lambda _: False)
        with METHOD(model_of("llava", "sdpa")) as trace, torch.no_grad():
            model_of("llava", "sdpa")(**inputs)
        kept.append([[k.tolist() for k in sample.kept] for sample in trace.samples])
    assert kept[0] == kept[1]


def test_another_thread_that_runs_meanwhile_gets_whole_projections():
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "single")
    with METHOD(model):
        expected = oracle.plain_logits(model, inputs)
    me, seen = threading.get_ident(), []

    def meanwhile(*_):
        if threading.get_ident() == me and not seen:
            seen.append(None)
            thread = threading.Thread(
                target=lambda: seen.append(oracle.plain_logits(model, inputs))
            )
            thread.start()
            thread.join()

    # Queries are projected first: at the keys the look is under way.
    hook = locate(model).attentions[0].k_proj.register_forward_pre_hook(meanwhile)
    with hook, METHOD(model), torch.no_grad():
        model(**inputs)
    # The block serves threads without one of their own.
    assert torch.equal(seen[1], expected)


def test_a_look_that_fails_leaves_no_hook_behind():
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "single")
    plain, hooks = oracle.plain_logits(model, inputs), hooks_of(model)

    def fail(*_):
        raise RuntimeError("stop")

    with METHOD(model), torch.no_grad():
        hook = locate(model).attentions[0].k_proj.register_forward_pre_hook(fail)
        with hook, pytest.raises(RuntimeError, match="stop"):
            model(**inputs)
    assert hooks_of(model) == hooks
    assert torch.equal(oracle.plain_logits(model, inputs), plain)


def test_what_a_projection_of_another_kind_gives_is_used(monkeypatch):
    # As adapters and quantisation do: the projection is a module that is no nn.Linear.
    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, states):
            return self.base(states) * 2 + states.mean(dim=-1, keepdim=True)

    models = [zoo.build("llava", attention) for attention in ("sdpa", "eager")]
    for model in models:
        attention = locate(model).attentions[0]
        attention.q_proj, attention.v_proj = Adapter(attention.q_proj), Adapter(attention.v_proj)
    inputs = zoo.inputs("llava", models[0], "padded3")
    with METHOD(models[0]) as trace, torch.no_grad():
        models[0](**inputs)
    assert_kept_by_layer_0(trace.samples, attention_of_layer_0(models[1], inputs))


# Budgets.


def test_the_smallest_budget_is_one_token_in_every_layer():
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3")
    with AutoPrune(1, first_cut="peek")(model) as trace, torch.no_grad():
        model(**inputs)
    assert [s.tokens_per_layer for s in trace.samples] == [[1] * zoo.LAYERS] * 3
    assert_kept_by_layer_0(trace.samples, attention_of_layer_0(model_of("llava", "eager"), inputs))


def test_the_speed_of_a_device_decides_how_often_to_cut(monkeypatch):
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3")
    speed = DeviceSpeed(0, 1e-9, 1e-9, 1)
    monkeypatch.setattr("autoprune.engine.context.device_speed", lambda _: speed)
    result = oracle.compare(model, inputs, replace(METHOD, cut_every="auto"), steps=3)
    assert result.worst < TOLERANCE
    assert_kept_by_layer_0(result.samples, attention_of_layer_0(model_of("llava", "eager"), inputs))
    for sample in result.samples:
        assert sample.decision.startswith("Cuts in every layer")
        assert sum(sample.tokens_per_layer) == round(0.3 * zoo.LAYERS * sample.num_visual)


@pytest.mark.parametrize("merger", [None, "dpc_knn"])
@pytest.mark.parametrize("mi_layer", ["peek", 0, 1, 3])
def test_no_prompt_has_more_than_its_capacity(mi_layer, merger):
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3_text")
    method = replace(METHOD, k0=3.0, gamma=1.5, mi_layer=mi_layer, merger=merger)
    with method(model) as trace, torch.no_grad():
        model(**inputs)
    for sample in trace.samples:
        room = method.capacity(zoo.LAYERS, sample.num_visual, sample.num_text)
        assert all(n <= most for n, most in zip(sample.tokens_per_layer, room, strict=True))
        assert room[0] == sample.tokens_per_layer[0] or mi_layer == "peek"
        assert sum(sample.tokens_per_layer) == round(0.3 * zoo.LAYERS * sample.num_visual)


# Information at the look.


def information_of_layer_0(plain, inputs):
    """Bits of each prompt, from a plain eager forward: text rows against all its visual tokens."""
    visual = zoo.visual_mask(plain, inputs["input_ids"])
    with torch.no_grad():
        maps = plain(**inputs, use_cache=False, output_attentions=True).attentions[0]
    found = []
    for row, real in enumerate(inputs["attention_mask"].bool()):
        columns, own = real.nonzero().squeeze(1), visual[row].nonzero().squeeze(1)
        bits = []
        for joint in maps[row][:, columns[columns > own[-1]]][..., own].double():
            joint = joint / joint.sum()
            product = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
            bits.append((joint * (joint / product).log2()).nansum().item())
        found.append(sum(bits) / len(bits))
    return found


@pytest.mark.parametrize("merger", [None, "summary"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", "gemma3"])
def test_information_that_is_measured_at_the_look_decides_all_layers(name, merger):
    model, plain = model_of(name, zoo.FAMILIES[name].attentions[0]), model_of(name, "eager")
    inputs = zoo.inputs(name, model, "padded3")
    method = replace(METHOD, mi_layer="peek", k0=0.6, gamma=0.35, x0=9.0, merger=merger)
    result = oracle.compare(model, inputs, method, steps=3)
    assert result.worst < TOLERANCE
    expected = information_of_layer_0(plain, inputs)
    assert len({round(bits, 4) for bits in expected}) == len(expected)
    if merger is None:
        assert_kept_by_layer_0(result.samples, attention_of_layer_0(plain, inputs))
    for sample, bits in zip(result.samples, expected, strict=True):
        assert sample.mutual_information == pytest.approx(bits, abs=1e-4)
        planned = method.plan(zoo.LAYERS, sample.num_visual, sample.mutual_information)
        assert sample.tokens_per_layer == planned
        assert planned != method.plan(zoo.LAYERS, sample.num_visual, 0.0)


def test_a_shared_budget_reaches_layer_0_where_information_is_measured_at_the_look():
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3")
    budget = Budget.tokens(6, over="batch")
    method = AutoPrune(budget, first_cut="peek", mi_layer="peek", fleet=Fleet(uneven))
    result = oracle.compare(model, inputs, method, steps=3)
    assert result.worst < TOLERANCE
    tokens = [sample.tokens_per_layer for sample in result.samples]
    assert sum(map(sum, tokens)) == 3 * 6 * zoo.LAYERS
    assert tokens[0][0] > tokens[1][0] > tokens[2][0]


def test_a_stream_shares_from_layer_0_on_and_never_spends_more():
    model, fleet = model_of("llava", "sdpa"), Fleet()
    budget = Budget.tokens(6, over="stream")
    method = AutoPrune(budget, first_cut="peek", mi_layer="peek", fleet=fleet, merger="summary")
    spent = 0
    for turn in range(4):
        inputs = zoo.inputs("llava", model, "padded3", seed=turn)
        with method(model) as trace, torch.no_grad():
            model(**inputs)
        spent += sum(sum(sample.tokens_per_layer) for sample in trace.samples)
        assert spent == fleet.state.spent <= fleet.state.allowed == (turn + 1) * 3 * 6 * zoo.LAYERS


def uneven(prompts, tokens):
    """The first prompt of a batch is the neediest."""
    weight = np.arange(len(prompts), 0, -1.0) ** 2
    return -weight[:, None] * tokens[None] ** 0.5


# Rankings.


def slow_order(features, quality, number):
    """Greedy: each pick makes the determinant of the picked tokens' kernel the largest."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    kernel = quality[:, None] * (unit @ unit.T) * quality[None]
    picked = []
    for _ in range(number):
        left = [i for i in range(len(quality)) if i not in picked]
        sets = [[*picked, i] for i in left]
        values = [np.linalg.slogdet(kernel[np.ix_(own, own)])[1] for own in sets]
        picked.append(left[int(np.argmax(values))])
    return picked


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9))
def test_scores_rank_first_what_a_slow_loop_picks_then_by_relevance(seed, number, present):
    draw = np.random.default_rng(seed)
    width, counts = 9, [9, present]
    features, relevance = draw.normal(size=(2, width, 12)), draw.uniform(0.1, 1, size=(2, width))
    mask = np.arange(width) < np.array(counts)[:, None]
    scores = relevance_and_diversity(
        *(torch.tensor(array, dtype=torch.float32) for array in (relevance, features)),
        number,
        torch.tensor(mask),
    )
    order = scores.where(torch.tensor(mask), -1.0).argsort(dim=1, descending=True).tolist()
    for row, count in enumerate(counts):
        own = relevance[row, :count]
        picked = slow_order(features[row, :count], (own / own.max()) ** 1.5, min(number, count))
        rest = sorted(set(range(count)) - set(picked), key=lambda i, own=own: -own[i])
        assert order[row][:count] == picked + rest


@pytest.mark.parametrize("first_cut", ["peek", "after_layer_0"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_text_and_diversity_keeps_what_a_slow_loop_picks(name, first_cut):
    model, plain = model_of(name, "sdpa"), model_of(name, "eager")
    inputs = zoo.inputs(name, model, "padded3_text")
    cut = int(first_cut == "after_layer_0")
    method = AutoPrune(Budget.ratio(0.4), first_cut=first_cut, first_ranking="text+diversity")
    result = oracle.compare(model, inputs, method, steps=3)
    assert result.worst < TOLERANCE
    states = []
    with (
        plain.get_decoder()
        .layers[cut]
        .register_forward_pre_hook(
            lambda _, args: states.append(args[0].double().numpy(force=True))
        )
    ):
        scores = attention_of_layer_0(plain, inputs)
    visual = zoo.visual_mask(model, inputs["input_ids"])
    for row, (sample, own) in enumerate(zip(result.samples, scores, strict=True)):
        if not sample.num_visual:
            continue
        number = sample.tokens_per_layer[cut]
        assert 1 < number < sample.num_visual
        quality = (own / own.max()).double().numpy(force=True) ** 1.5
        picked = slow_order(states[0][row, visual[row]], quality, number)
        assert sample.kept[cut].tolist() == sorted(picked)


def test_text_and_diversity_is_another_ranking_than_text():
    model = model_of("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "single")
    kept = []
    for ranking in ("text", "text+diversity"):
        with AutoPrune(RATIO, first_cut="peek", first_ranking=ranking)(model) as trace:
            oracle.plain_logits(model, inputs)
        kept.append(trace.samples[0].kept[0].tolist())
    assert kept[0] != kept[1]


@pytest.mark.parametrize("first_cut", ["peek", "after_layer_0"])
def test_text_and_vision_adds_shares(first_cut):
    model, plain = model_of("llava", "sdpa"), model_of("llava", "eager")
    inputs = zoo.inputs("llava", model, "single")
    cut = int(first_cut == "after_layer_0")
    (text,) = attention_of_layer_0(plain, inputs)
    vision = torch.rand(1, len(text), generator=torch.Generator().manual_seed(0))
    method = AutoPrune(
        Budget.ratio(0.4), first_cut=first_cut, first_ranking="text+vision", text_weight=2.0
    )
    with method(model, vision_scores=vision) as trace, torch.no_grad():
        model(**inputs)
    both = vision[0] / vision.sum() + 2 * text / text.sum()
    (sample,) = trace.samples
    number = sample.tokens_per_layer[cut]
    assert sample.kept[cut].tolist() == best(both, number) != best(text, number)


def test_text_alone_after_layer_0():
    model, plain = model_of("llava", "sdpa"), model_of("llava", "eager")
    inputs = zoo.inputs("llava", model, "padded3")
    with AutoPrune(Budget.ratio(0.4), first_ranking="text")(model) as trace, torch.no_grad():
        model(**inputs)
    for sample, own in zip(trace.samples, attention_of_layer_0(plain, inputs), strict=True):
        assert sample.kept[1].tolist() == best(own, sample.tokens_per_layer[1])


def test_the_peek_works_without_a_vision_tower():
    model, plain = model_of("llava", "sdpa"), model_of("llava", "eager")
    inputs = zoo.inputs("llava", model, "single")
    visual = zoo.visual_mask(model, inputs["input_ids"])
    caught = []
    with model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
    ):
        oracle.plain_logits(model, inputs)
    for ranking in (None, "text+vision"):
        method = AutoPrune(RATIO, first_cut="peek", first_ranking=ranking)
        with method(model, visual_mask=visual) as trace, torch.no_grad():
            model(inputs_embeds=caught[0], attention_mask=inputs["attention_mask"])
        assert_kept_by_layer_0(trace.samples, attention_of_layer_0(plain, inputs))


def test_prompts_of_one_batch_may_peek_or_not():
    model, plain = model_of("llava", "sdpa"), model_of("llava", "eager")
    inputs = zoo.inputs("llava", model, "padded3")
    methods = [
        METHOD,
        AutoPrune(Budget.ratio(0.5)),
        AutoPrune(RATIO, first_cut="peek", first_ranking="text+diversity"),
    ]
    with autoprune.per_prompt(methods)(model) as trace, torch.no_grad():
        model(**inputs)
    alone = []
    for row, method in enumerate(methods):
        with method(model) as single, torch.no_grad():
            model(**zoo.inputs("llava", model, "padded3", only=row))
        alone += single.samples
    for sample, other in zip(trace.samples, alone, strict=True):
        assert [k.tolist() for k in sample.kept] == [k.tolist() for k in other.kept]
    scores = attention_of_layer_0(plain, inputs)
    assert_kept_by_layer_0(trace.samples[:1], scores[:1])
