"""Tokens that stand for several: summaries of what was dropped, and sizes of merged tokens."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import autoprune
from autoprune import AutoPrune, Budget, SummaryToken, UnsupportedError
from autoprune.contract import Needs, Selection
from autoprune.engine.tokens.summary import Mean
from autoprune.methods.base import Planned, PreDecoder
from autoprune.parts.selectors import top_k
from autoprune.policy.released import recycled_count
from tests import kernels, oracle, zoo
from tests.engine.test_ends_with_picture import ending
from tests.scattered import DEEP, Scattered
from tests.spy import Spy, for_oracle

TOLERANCE = 2e-4
BATCHES = ["single", "padded3", "padded3_text"]
SETTINGS = [
    pytest.param(name, attention, media, id=f"{name}-{attention}-{media}")
    for name, family in zoo.FAMILIES.items()
    for attention in family.attentions
    for media in family.media
]
FORMS = {
    "default": SummaryToken(),
    "half, last, typical": SummaryToken(0.5, "last", "typical"),
    "no size": SummaryToken(0.0),
}
DROPPING = [
    name
    for name, method in autoprune.methods.METHODS.items()
    if issubclass(method, Planned) and not method.merges and name != "no_image"
]
model_of = functools.cache(zoo.build)
close = functools.partial(torch.testing.assert_close, atol=TOLERANCE, rtol=0)


def copied(conversation):
    other = copy.copy(conversation)
    other.cache = copy.deepcopy(conversation.cache)
    return other


def of(form="summary", budget=0.5, **options):
    return AutoPrune(Budget.ratio(budget), merger=form, **options)


@pytest.mark.parametrize("batch", ["single", "padded3"])
@pytest.mark.parametrize(("name", "attention", "media"), SETTINGS)
def test_summaries_equal_the_oracle(name, attention, media, batch):
    model = model_of(name, attention)
    arguments = zoo.inputs(name, model, batch, media)
    result = oracle.compare(model, arguments, of(), steps=3)
    assert result.worst < TOLERANCE
    for sample in result.samples:
        total = sample.num_visual
        assert (sample.summary_token is None) == (total == 0)
        assert sum(sample.tokens_per_layer) == round(zoo.LAYERS * 0.5 * total)
        assert all(sample.summary_token in kept.tolist() for kept in sample.kept if total)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_every_form_equals_the_oracle(name, form, batch):
    model = model_of(name, zoo.FAMILIES[name].attentions[0])
    arguments = zoo.inputs(name, model, batch)
    results = {}
    for every in (1, 8):
        method = of(FORMS[form], rank_every=every)
        results[every] = oracle.compare(model, arguments, method, steps=2)
        assert results[every].worst < TOLERANCE


@pytest.mark.parametrize(
    ("family", "batch"), [("llava", "padded3"), ("llava", "single"), ("qwen2_5_vl", "padded3_text")]
)
@pytest.mark.parametrize("name", DROPPING)
def test_every_method_that_drops_may_summarise(name, family, batch):
    if name == "sparsevlm":
        method = autoprune.create(name, Budget.ratio(0.5), recycle=False, merger="summary")
    else:
        method = autoprune.create(name, Budget.ratio(0.5), merger="summary")
    model = model_of(family, "sdpa")
    result = oracle.compare(model, zoo.inputs(family, model, batch), method, steps=2)
    assert result.worst < TOLERANCE
    for sample in result.samples:
        assert sample.tokens_per_layer == sample.schedule
        assert (sample.summary_token is None) == (sample.tokens_per_layer[-1] == 0)


@dataclass(frozen=True)
class Falling(Planned):
    """Few tokens, then a single one; by scores that know nothing of what has to stay."""

    name: ClassVar[str] = "falling"
    merger: str = "summary"

    def shape(self, setting, num_visual, num_layers):
        return [setting, setting, 3, 3, 1, 1]

    def choose(self, seen, counts, state):
        return Selection(top_k(-seen.index.float(), counts, seen.mask), list(counts))


@pytest.mark.parametrize("batch", ["single", "padded3"])
@pytest.mark.parametrize(
    "method",
    [
        AutoPrune(4, first_cut="peek", gamma=0.0, k0=2.0, rank_every=1, merger="summary"),
        AutoPrune(4, first_cut="peek", gamma=0.0, k0=2.0, merger="summary"),
        Falling(5),
    ],
    ids=["every cut", "rankings", "selections"],
)
def test_a_last_token_that_is_visual_outlives_the_summary(method, batch):
    model = model_of("llava", "sdpa")
    arguments = ending("llava", model, batch, rows=(0, 2))
    result = oracle.compare(model, arguments, method)
    assert result.worst < TOLERANCE
    for row, sample in enumerate(result.samples):
        assert sample.tokens_per_layer[-1] == 1 and sample.summary_token is not None
        if row == 1:
            assert sample.kept[-1].tolist() == [sample.summary_token]
        else:
            assert all(int(kept[-1]) == sample.num_visual - 1 for kept in sample.kept)


@pytest.mark.parametrize("rank_every", [1, 8])
@pytest.mark.parametrize("batch", ["padded3", "padded3_text"])
def test_a_picture_that_is_not_finite_reaches_no_other_prompt(batch, rank_every):
    model = model_of("llava", "sdpa")
    arguments = zoo.inputs("llava", model, batch)
    visual = zoo.visual_mask(model, arguments["input_ids"]).sum(dim=1)
    method = of(budget=0.4, rank_every=rank_every)
    with method(model), torch.no_grad():
        expected = model(**arguments).logits[:, -1]
    for picture in range(len(arguments["pixel_values"])):
        pixels = arguments["pixel_values"].clone()
        pixels[picture] = math.nan
        # 16 visual tokens a picture.
        own = int((visual.cumsum(0) > 16 * picture).to(torch.uint8).argmax())
        with method(model), torch.no_grad():
            got = model(**arguments | {"pixel_values": pixels}).logits[:, -1]
        assert got[own].isnan().all()
        others = [row for row in range(3) if row != own]
        close(got[others], expected[others])


@pytest.mark.parametrize("rank_every", [1, 8])
def test_a_prompt_without_a_summary_is_not_computed_anew(rank_every, monkeypatch):
    """Multiplied by 1 its states would be rounded, where products are made of TF32 numbers."""
    model = model_of("llava", "sdpa")
    arguments = zoo.inputs("llava", model, "padded3_text")
    method, found = of(rank_every=rank_every), []
    right = Mean.of
    for mean in (right, lambda *given: right(*given) + 1.0):
        monkeypatch.setattr(Mean, "of", mean)
        with method(model), torch.no_grad():
            found.append(model(**arguments).logits[:, -1])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize("name", ["visionzip", "tome", "prumerge", "sparsevlm", "pooling", "pact"])
def test_methods_that_merge_leave_nothing_for_a_summary(name):
    with pytest.raises(ValueError, match="merges dropped tokens itself"):
        autoprune.create(name, 16, merger="summary")


@pytest.mark.parametrize("batch", ["padded3", "padded3_text"])
@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_beams_and_copies_follow_their_prompt(name, batch):
    if batch == "padded3" and not zoo.SINCE_5_19:
        pytest.skip("this transformers mixes up the pictures of a copied prompt that holds two")
    model = model_of(name, "sdpa")
    arguments = zoo.inputs(name, model, batch)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3}
    method = of()
    with method(model) as trace, torch.no_grad():
        got = model.generate(**arguments, **options)
    for row in range(3):
        alone = zoo.inputs(name, model, batch, only=row)
        with method(model) as own, torch.no_grad():
            expected = model.generate(**alone, **options)
        beams = trace.samples[3 * row : 3 * row + 3]
        assert {beam.summary_token for beam in beams} == {own.samples[0].summary_token}
        new = expected.shape[1] - alone["input_ids"].shape[1]
        assert got[row, -new:].tolist() == expected[0, -new:].tolist()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_second_turn_of_several_tokens_equals_the_oracle(name):
    model = model_of(name, "sdpa")
    arguments = zoo.inputs(name, model, "padded3")
    words = torch.randint(10, 100, (3, 5), generator=torch.Generator().manual_seed(1))
    method = of()
    with method(model) as trace:
        conversation = oracle.Conversation(model, arguments)
        again = copied(conversation)
        rows = [conversation.logits[:, -1:], conversation.feed(words[:, :1])]
        rows.append(conversation.feed(words[:, 1:]))
        at_once = again.feed(words)
    mask = arguments["attention_mask"]
    columns = oracle.columns_from_trace(trace.samples, mask, zoo.LAYERS)
    summary = oracle.summary_of(trace.samples, mask, method.summary)
    expected = oracle.oracle_logits(model, arguments, columns, words, summary=summary)
    close(torch.cat(rows, dim=1), expected)
    close(at_once, expected[:, 1:])


def test_the_rows_of_a_cache_are_moved_with_their_summaries():
    model = model_of("llava", "sdpa")
    arguments = zoo.inputs("llava", model, "padded3")
    word = torch.tensor([[11], [12], [13]])
    with of()(model), torch.inference_mode():
        conversation = oracle.Conversation(model, arguments)
        other = copied(conversation)
        expected = conversation.feed(word)
        order = torch.tensor([2, 0, 1])
        other.cache.reorder_cache(order)
        other.mask = other.mask[order]
        moved = other.feed(word[order])
    close(moved, expected[order])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", ["single", "padded3", "padded3_text"])
def test_static_caches_hold_summaries(batch, implementation):
    model = model_of("llava", implementation)
    arguments = zoo.inputs("llava", model, batch)
    visual = zoo.visual_mask(model, arguments["input_ids"]).sum(dim=1)
    text = int((arguments["attention_mask"].sum(dim=1) - visual).max())
    method = of(k0=3.0, gamma=1.5)
    with method(model) as trace:
        expected, tokens = oracle.generate_logits(model, arguments, 4)
    handle = method.attach(model)
    try:
        cache = handle.static_cache([n for n in visual.tolist() if n], text, 8)
        for _ in range(2):
            got, _ = oracle.generate_logits(model, arguments, 4, past_key_values=cache)
            close(got, expected)
            cache.reset()
        close(oracle.manual_logits(model, arguments, tokens[:, :4], cache), expected)
    finally:
        handle.detach()
    assert trace.samples[0].summary_token is not None


def test_a_plain_cache_is_not_gone_on_with_when_pruning_ends():
    model = model_of("llava", "sdpa")
    arguments = zoo.inputs("llava", model, "single")
    with of()(model):
        conversation = oracle.Conversation(model, arguments)
    with pytest.raises(UnsupportedError, match="a token in it counts for several"):
        conversation.feed(torch.tensor([[11]]))


def test_compiled_layers_take_summaries():
    model = zoo.build("llava", "sdpa")
    arguments = zoo.inputs("llava", model, "single")
    method = of()
    with method(model):
        expected = oracle.manual_logits(model, arguments, torch.tensor([[11, 12]]))
    handle = method.attach(model)
    try:
        handle.compile_prefill(backend="eager")
        close(oracle.manual_logits(model, arguments, torch.tensor([[11, 12]])), expected)
    finally:
        handle.detach()


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_forward_returns_the_oracles_rows(padding_side):
    model = model_of("llava", "sdpa")
    arguments = zoo.inputs("llava", model, "padded3", padding_side=padding_side)
    method = of()
    with method(model) as trace, torch.no_grad():
        actual = model(**arguments).logits
    mask = arguments["attention_mask"]
    columns = oracle.columns_from_trace(trace.samples, mask, zoo.LAYERS)
    summary = oracle.summary_of(trace.samples, mask, method.summary)
    expected = oracle.oracle_forward(model, arguments, columns, summary=summary)
    alive = columns[-1] & mask.bool()
    close(actual[alive], expected[alive])


@pytest.mark.parametrize(
    "method", [of(budget=1.0), autoprune.create("fastv", 1000, merger="summary")]
)
def test_where_nothing_is_dropped_there_is_no_summary(method):
    model = model_of("llava", "sdpa")
    arguments = zoo.inputs("llava", model, "padded3")
    plain = oracle.plain_logits(model, arguments)
    with method(model) as trace, torch.no_grad():
        got = model(**arguments).logits[:, -1:]
    assert torch.equal(got, plain)
    assert [sample.summary_token for sample in trace.samples] == [None] * 3


def test_one_slot_is_the_summary_of_everything():
    """A single token enters the later layers: the mean of all, with the whole logarithm."""
    model = model_of("llava", "sdpa")
    arguments = zoo.inputs("llava", model, "single")
    method = autoprune.create("fastervlm", 1, merger="summary")
    result = oracle.compare(model, arguments, method)
    assert result.worst < TOLERANCE
    (sample,) = result.samples
    assert sample.tokens_per_layer == [1] * zoo.LAYERS
    assert sample.kept[0].tolist() == [sample.summary_token]
    # The first of the two in the middle.
    assert sample.summary_token == (sample.num_visual - 1) // 2


@dataclass(frozen=True)
class Sized(PreDecoder):
    """Keeps every other token and gives each kept one a size."""

    name: ClassVar[str] = "sized"
    paper: ClassVar[str] = "none"
    looks: ClassVar[Needs] = Needs()
    size: float = 3.0

    def choose(self, seen, counts, state):
        scores = (seen.index % 2 == 0).float()
        kept = top_k(scores, counts, seen.mask)
        sizes = torch.full(kept.shape, self.size)
        sizes[:, 0] = 1.0
        return Selection(kept, list(counts), sizes=sizes)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sizes_that_a_method_gives_equal_the_oracle(batch, attention):
    model = model_of("llava", attention)
    arguments = zoo.inputs("llava", model, batch)
    mask = arguments["attention_mask"]
    with Sized(Budget.ratio(0.5))(model) as trace:
        logits, tokens = oracle.generate_logits(model, arguments, 3)
    columns = oracle.columns_from_trace(trace.samples, mask, zoo.LAYERS)
    bias = torch.zeros(mask.shape)
    for row, sample in enumerate(trace.samples):
        places = mask[row].nonzero().flatten()[sample.visual_positions]
        bias[row, places[sample.kept[0][1:]]] = math.log(3.0)
    expected = oracle.oracle_logits(
        model, arguments, columns, tokens[:, :3], biases=[bias] * zoo.LAYERS
    )
    close(logits, expected)
    without = oracle.oracle_logits(model, arguments, columns, tokens[:, :3])
    assert (expected - without).abs().max() > 0.01


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", ["visionzip", "tome", "turbo", "folder", "pact"])
def test_merged_tokens_count_for_what_they_are_made_of(name, batch):
    model = model_of("llava", "sdpa")
    arguments = zoo.inputs("llava", model, batch)
    spy = Spy(autoprune.create(name, Budget.ratio(0.5), proportional=True))
    with spy(model):
        logits, tokens = oracle.generate_logits(model, arguments, steps=2)
    (decisions,) = spy.decisions
    visual = zoo.visual_mask(model, arguments["input_ids"])
    kept, states = for_oracle(decisions, arguments, visual, zoo.LAYERS)
    biases = [torch.zeros(visual.shape) for _ in range(zoo.LAYERS)]
    for seen, selection in spy.answers:
        for row in range(len(visual)):
            # What is made of several tokens is their mean, so their number can be told by hand.
            places = visual[row].nonzero().flatten()[selection.kept[row, : selection.counts[row]]]
            sizes = selection.sizes[row, : selection.counts[row]]
            assert (sizes >= 1).all() and float(sizes.sum()) <= seen.counts[row]
            for layer in range(seen.cut, zoo.LAYERS):
                biases[layer][row, places] = sizes.log()
    assert max(float(bias.max()) for bias in biases) > 0.6
    expected = oracle.oracle_logits(
        model, arguments, kept, tokens[:, :2], spy.positions, states, biases=biases
    )
    close(logits, expected)


@pytest.mark.parametrize("batch", BATCHES)
def test_recycled_tokens_count_for_their_clusters(batch):
    """All clusters together are made of all tokens that were recycled."""
    model = model_of("llava", "sdpa")
    arguments = zoo.inputs("llava", model, batch)
    spy = Spy(autoprune.create("sparsevlm", Budget.ratio(0.5), proportional=True))
    with spy(model):
        oracle.generate_logits(model, arguments, steps=1)
    merging = [(seen, s) for seen, s in spy.answers if s is not None and s.merged is not None]
    assert merging
    for seen, selection in merging:
        merged = selection.merged
        for row, number in enumerate(merged.counts):
            dropped = seen.counts[row] - selection.counts[row]
            assert float(merged.sizes[row, :number].sum()) == (
                recycled_count(dropped) if number else 0
            )


@pytest.mark.parametrize("size", [0.0, -1.0, math.nan, math.inf])
def test_sizes_that_are_none(size):
    model = model_of("llava", "sdpa")
    arguments = zoo.inputs("llava", model, "single")
    method = Sized(Budget.ratio(0.5))
    object.__setattr__(method, "size", size)
    with method(model), pytest.raises(ValueError, match="sizes at cut 0"):
        model(**arguments)


def test_a_summary_beside_a_method_that_merges_by_itself():
    @dataclass(frozen=True)
    class Wrong(Scattered):
        @property
        def summary(self):
            return SummaryToken()

        def select(self, seen, state):
            selection = super().select(seen, state)
            states = torch.zeros(*selection.kept.shape, zoo.HIDDEN)
            return Selection(selection.kept, selection.counts, states=states)

    model = model_of("llava", "sdpa")
    with Wrong(DEEP)(model), pytest.raises(ValueError, match="use it without a summary"):
        model(**zoo.inputs("llava", model, "single"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": -1}, "strength of a SummaryToken must be a number, 0 or more, got -1"),
        ({"strength": math.nan}, "got nan"),
        ({"strength": "1"}, "got '1'"),
        ({"position": "first"}, "position of a SummaryToken must be one of"),
        ({"norm": None}, "norm of a SummaryToken must be one of"),
    ],
)
def test_settings_of_a_summary_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        SummaryToken(**settings)


def test_a_summary_as_text():
    half = SummaryToken(0.5, "last", "typical")
    assert SummaryToken.of(str(half)) == half
    assert AutoPrune(16, merger="summary strength=0.5").summary == SummaryToken(0.5)
    for wrong in ("summary 3", "summary size=3", "summaries", "summary strength=x"):
        with pytest.raises(ValueError, match=r"(?i)summary"):
            AutoPrune(16, merger=wrong)


def test_a_batch_of_different_budgets_summarises_each_prompt():
    model = model_of("llava", "sdpa")
    arguments = zoo.inputs("llava", model, "padded3")
    method = AutoPrune.per_prompt([Budget.ratio(0.3), None, Budget.ratio(0.6)], merger="summary")
    result = oracle.compare(model, arguments, method)
    assert result.worst < TOLERANCE
    first, whole, last = result.samples
    assert whole.summary_token is None
    for sample, share in ((first, 0.3), (last, 0.6)):
        assert sample.summary_token is not None
        assert sum(sample.tokens_per_layer) == round(zoo.LAYERS * share * sample.num_visual)


def test_methods_of_a_batch_agree_in_their_summaries():
    methods = [AutoPrune(9, merger="summary"), AutoPrune(9)]
    with pytest.raises(ValueError, match="summar"):
        autoprune.per_prompt(methods)


def test_different_methods_side_by_side_summarise_as_alone():
    model = model_of("llava", "sdpa")
    arguments = zoo.inputs("llava", model, "padded3")
    own = [
        AutoPrune(Budget.ratio(0.4), merger="summary"),
        autoprune.create("pdrop", Budget.ratio(0.5), merger="summary"),
        autoprune.create("fastervlm", Budget.ratio(0.3), merger="summary"),
    ]
    result = oracle.compare(model, arguments, autoprune.per_prompt(own))
    assert result.worst < TOLERANCE
    for row, method in enumerate(own):
        alone = zoo.inputs("llava", model, "padded3", only=row)
        with method(model) as trace, torch.no_grad():
            model(**alone)
        assert trace.samples[0].summary_token == result.samples[row].summary_token
        assert trace.samples[0].tokens_per_layer == result.samples[row].tokens_per_layer


def test_flash_attention_refuses_sizes_and_flex_attention_adds_them():
    model = zoo.build("llava", "sdpa")
    arguments = zoo.inputs("llava", model, "padded3")
    refused = pytest.raises(UnsupportedError, match="use attn_implementation='sdpa'")
    with kernels.flash_attention(model), of()(model), refused:
        model(**arguments)
    without_size = of("summary strength=0")
    with torch.no_grad(), without_size(model):
        expected, _ = oracle.generate_logits(model, arguments, 2)
    with kernels.flash_attention(model), without_size(model) as trace:
        got, _ = oracle.generate_logits(model, arguments, 2)
    close(got, expected)
    assert all(sample.summary_token is not None for sample in trace.samples)
    with kernels.flex_attention(model):
        result = oracle.compare(model, arguments, of(), steps=2)
    assert result.worst < TOLERANCE
    assert all(sample.summary_token is not None for sample in result.samples)
