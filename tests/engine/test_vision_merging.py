"""Patches that merge inside the vision tower, against one picture and one pair at a time."""

from __future__ import annotations

import math
import threading
from contextlib import contextmanager, nullcontext

import pytest
import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import autoprune
from autoprune import Budget
from autoprune.contract import Selection, Tower
from autoprune.engine.vision.maps import PATCH_LAYOUTS
from autoprune.methods.folder import Folder
from autoprune.methods.tome import ToMe
from autoprune.methods.turbo import Turbo
from tests import oracle, zoo
from tests.kernels import flash_attention
from tests.spy import Spy

BLOCKS = 6
METHODS = [ToMe(4), Turbo(4, alpha=0.5), ToMe(Budget.ratio(0.5))]
# One prompt with a picture, one without, one with two; the decoder receives the last block but one.
BATCHES = ["single", "padded3", "padded3_text"]


class Shown(Spy):
    """A spy that remembers what it was shown, too."""

    def __init__(self, method):
        super().__init__(method)
        self.seen = []

    def select(self, seen, state):
        self.seen.append(seen)
        return super().select(seen, state)


def build(family="llava", attention="sdpa", **changes):
    """A model of the zoo whose tower is deeper."""
    config = zoo.FAMILIES[family].config()
    config.vision_config.num_hidden_layers = BLOCKS
    for name, value in changes.items():
        setattr(config, name, value)
    cls = getattr(transformers, zoo.FAMILIES[family].model)
    model = cls._from_config(config, attn_implementation=attention)
    zoo.randomise(model, 0)
    return model.eval()


def tower_of(model):
    return model.get_encoder(modality="image")


def blocks_of(model):
    return next(m for m in tower_of(model).modules() if isinstance(m, torch.nn.ModuleList))


@contextmanager
def entering(model):
    """How many tokens enter each block, run after run."""
    counts = []
    handles = [
        block.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
        for block in blocks_of(model)
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def run(model, method, arguments, generate=False):
    with torch.no_grad(), method(model) as trace:
        if generate:
            model.generate(**arguments, max_new_tokens=2, do_sample=False)
        else:
            model(**arguments)
    return trace.samples


def shares(method, model, arguments):
    """(kept, all) visual tokens of each prompt."""
    found = []
    for ids, mask in zip(arguments["input_ids"], arguments["attention_mask"], strict=True):
        total = int((ids == zoo.IMAGE).sum())
        if total:
            text = int(mask.sum()) - total
            cost = method(model).shape.cost
            found.append((method.plan(zoo.LAYERS, total, text, cost)[0], total))
    return found


# The slow version: a picture is a list of groups of patches, each with its state.


def slow_block(block, groups, states, proportional):
    """Output, key of each token (mean over heads), and the CLS token's attention to a patch of each, which
    always counts patches.
    """
    sizes = torch.tensor([float(len(group)) for group in groups])
    normed = block.layer_norm1(states)
    attention, heads, keys, weights = block.self_attn, [], [], []
    size = attention.head_dim
    for head in range(attention.num_heads):
        rows = slice(head * size, (head + 1) * size)
        query, key, value = (
            projection(normed)[:, rows]
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        scores = (query @ key.T / math.sqrt(size)).exp()
        weight = scores * sizes if proportional else scores
        heads.append(weight @ value / weight.sum(dim=1, keepdim=True))
        keys.append(key)
        weights.append(scores[0] / (scores[0] * sizes).sum())
    states = states + attention.out_proj(torch.cat(heads, dim=1))
    states = states + block.mlp(block.layer_norm2(states))
    return states, torch.stack(keys).mean(dim=0), torch.stack(weights).mean(dim=0)


def slow_merge(groups, states, keys, attention, leaving, alpha):
    """Every other token looks for the most similar of the rest; the best pairs are joined."""
    tokens = range(1, len(groups))  # the CLS token is one of the sources, and joins none
    patches = sum(len(groups[token]) for token in tokens)
    mean = sum(float(attention[token]) * len(groups[token]) for token in tokens) / patches
    pairs = []
    for one in tokens[1::2]:
        similar = [
            (float(torch.nn.functional.cosine_similarity(keys[one], keys[other], dim=0)), other)
            for other in tokens[::2]
        ]
        best, partner = max(similar, key=lambda pair: pair[0])
        pairs.append((best - alpha * float(attention[one]) / mean, one, partner))
    groups, sums = (
        [list(g) for g in groups],
        [len(g) * s for g, s in zip(groups, states, strict=True)],
    )
    leave = sorted(pairs, key=lambda pair: -pair[0])[:leaving]
    for _, one, partner in leave:
        groups[partner] += groups[one]
        sums[partner] = sums[partner] + sums[one]
    stay = [token for token in range(len(groups)) if token not in {one for _, one, _ in leave}]
    return [groups[t] for t in stay], torch.stack([sums[t] / len(groups[t]) for t in stay])


def slow_tower(model, pixels, keep, alpha, proportional):
    """Groups of patches and what the decoder receives for each patch, of one picture."""
    tower = tower_of(model)
    states = tower.pre_layrnorm(tower.embeddings(pixels[None]))[0]
    groups = [[patch] for patch in range(-1, len(states) - 1)]
    *early, selected = blocks_of(model)[:-1]
    for number, block in enumerate(early):
        states, keys, attention = slow_block(block, groups, states, proportional)
        present, rounds = len(groups) - 1, len(early) + 1 - number
        leaving = min(math.ceil((present - keep) / rounds), present // 2)
        groups, states = slow_merge(groups, states, keys, attention, leaving, alpha)
    states, _, _ = slow_block(selected, groups, states, proportional)
    received = torch.empty(sum(map(len, groups)) - 1, states.shape[1])
    for group, state in zip(groups[1:], states[1:], strict=True):
        received[group] = state
    return [sorted(group) for group in groups[1:]], received


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash"])
@pytest.mark.parametrize("has_run", [False, True], ids=["new", "has run"])
@pytest.mark.parametrize("method", METHODS, ids=str)
@torch.no_grad()
def test_the_tower_merges_as_one_pair_at_a_time_does(method, has_run, attention):
    model = build(attention="sdpa" if attention == "flash" else attention)
    arguments = zoo.inputs("llava", model, "padded3")
    if has_run:
        model(**arguments)  # installs transformers' own hooks in front of ours
    spy, received = Shown(method), []
    projector = model.base_model.multi_modal_projector
    handle = projector.register_forward_pre_hook(lambda _, args: received.append(args[0]))
    with flash_attention(model) if attention == "flash" else nullcontext():
        run(model, spy, arguments)
    handle.remove()
    patches = received[0].shape[1]
    keep = max(
        math.ceil(patches * kept / total) for kept, total in shares(method, model, arguments)
    )
    alpha, proportional = getattr(method, "alpha", 0.0), attention != "flash"
    slow = [
        slow_tower(model, pixels, keep, alpha, proportional) for pixels in arguments["pixel_values"]
    ]
    for (_, expected), actual in zip(slow, received[0], strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    (seen,) = spy.seen
    numbers = torch.cat([n[real] for n, real in zip(seen.vision_groups, seen.mask, strict=True)])
    found = {tuple((numbers == number).nonzero()[:, 0].tolist()) for number in numbers.unique()}
    assert found == {
        tuple(picture * patches + patch for patch in group)
        for picture, (groups, _) in enumerate(slow)
        for group in groups
    }


@pytest.mark.parametrize("generate", [False, True], ids=["forward", "generate"])
def test_every_block_sees_fewer_tokens_by_the_plan(generate):
    model = build()
    arguments = zoo.inputs("llava", model)
    for budget, expected in ((4, [16, 13, 10, 8, 6, 16]), (1, [16, 13, 10, 7, 4, 16])):
        with entering(model) as counts:
            (sample,) = run(model, ToMe(budget), arguments, generate)
        assert counts == [1 + patches for patches in expected]
        assert sample.tokens_per_layer == [budget] * zoo.LAYERS


@pytest.mark.parametrize("generate", [False, True], ids=["forward", "generate"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "budget", [5, Budget.ratio(0.3), Budget.ratio(0.9), Budget.flops(0.7)], ids=str
)
def test_pictures_keep_the_largest_share_of_the_prompts(budget, batch, generate):
    model, method = build(), ToMe(budget)
    arguments = zoo.inputs("llava", model, batch)
    planned = shares(method, model, arguments)
    left, expected = 16, [16]
    keep = max(math.ceil(16 * kept / total) for kept, total in planned)
    for rounds in (5, 4, 3, 2):
        left -= min(math.ceil((left - keep) / rounds), left // 2)
        expected.append(left)
    with entering(model) as counts:
        samples = run(model, method, arguments, generate)
    assert counts == [1 + patches for patches in [*expected, 16]]
    with_pictures = [sample for sample in samples if sample.num_visual]
    assert [(s.tokens_per_layer[0], s.num_visual) for s in with_pictures] == planned
    assert all(sample.tokens_per_layer == sample.schedule for sample in samples)


@pytest.mark.parametrize("family", ["llava_next", "paligemma"])
def test_tiles_and_towers_without_cls_token_merge_too(family):
    model = build(family, zoo.FAMILIES[family].attentions[0])
    arguments = zoo.inputs(family, model, "padded3")
    for method in (ToMe(Budget.ratio(0.4)), Turbo(Budget.ratio(0.4))):
        with entering(model) as counts:
            samples = run(model, method, arguments)
        selected = BLOCKS - (family == "paligemma")
        merging = counts[:selected] if family == "paligemma" else counts[: selected - 1]
        assert sorted(set(merging), reverse=True) == merging
        assert all(sample.tokens_per_layer == sample.schedule for sample in samples)


@pytest.mark.parametrize(
    "family",
    [
        name
        for name, family in zoo.FAMILIES.items()
        if not getattr(PATCH_LAYOUTS.get(family.config().model_type), "merges", False)
    ],
)
def test_towers_of_other_families_see_every_patch(family):
    model = zoo.build(family, zoo.FAMILIES[family].attentions[0])
    assert not ToMe(4)(model).vision.parts.merging


def test_it_stays_at_the_towers_end_where_it_must():
    model = build()
    arguments = zoo.inputs("llava", model, "padded3")
    total = int((arguments["input_ids"] == zoo.IMAGE).sum())
    several = build(vision_feature_layer=[-3, -2])
    for subject, method, options, call in (
        (model, Folder(4), {}, {}),
        (model, ToMe(4), {"vision_scores": torch.rand(total)}, {}),
        (model, ToMe(4), {}, {"vision_feature_layer": -3}),
        (model, ToMe(1000), {}, {}),
        (several, ToMe(4), {}, {}),
    ):
        with entering(subject) as counts, torch.no_grad(), method(subject, **options):
            subject(**arguments, **call)
        assert set(counts) == {17}


def test_towers_with_positions_in_every_block_see_every_patch():
    config = zoo.FAMILIES["llava"].config()
    config.vision_config = transformers.PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        head_dim=16,
        patch_size=7,
        image_size=112,
    )
    config.vision_feature_layer, config.vision_feature_select_strategy = -1, "full"
    model = transformers.LlavaForConditionalGeneration(config)
    zoo.randomise(model, 0)
    sizes = torch.tensor([[28, 21], [14, 28]])
    ids = torch.tensor([[zoo.BOS, *[zoo.IMAGE] * n, *range(5, 17 - n)] for n in (12, 8)])
    arguments = {"pixel_values": torch.randn(2, 3, 28, 28), "image_sizes": sizes, "input_ids": ids}
    with entering(model.eval()) as counts:
        samples = run(model, ToMe(4), arguments)
    assert counts == [20] * 3
    assert all(sample.tokens_per_layer == [4] * zoo.LAYERS for sample in samples)


def test_features_for_no_prompt_in_particular_are_whole():
    model = build()
    arguments = zoo.inputs("llava", model)
    pixels = arguments["pixel_values"]
    with torch.no_grad():
        plain = model.model.get_image_features(pixels).pooler_output[0]
        with ToMe(4)(model), entering(model) as counts:
            assert torch.equal(model.model.get_image_features(pixels).pooler_output[0], plain)
            model(**arguments)
            assert torch.equal(model.model.get_image_features(pixels).pooler_output[0], plain)
            tower_of(model)(pixels)
    assert counts[:6] == counts[12:18] == counts[18:] == [17] * 6


def test_a_later_turn_is_not_planned_for():
    model = build()
    arguments = zoo.inputs("llava", model)
    total, text = 16, arguments["input_ids"].shape[1] - 16
    cost = ToMe(4)(model).shape.cost
    # Nothing is left for a longer text.
    budget = Budget.kv_bytes(cost.kv_bytes([4] * zoo.LAYERS, text))
    assert ToMe(budget).plan(zoo.LAYERS, total, text, cost)[0] == 4
    with torch.no_grad(), ToMe(budget)(model) as trace:
        first = model.generate(
            **arguments, max_new_tokens=2, do_sample=False, return_dict_in_generate=True
        )
        longer = torch.cat([first.sequences, torch.full((1, 9), 7)], dim=1)
        later = model.generate(
            input_ids=longer, past_key_values=first.past_key_values, max_new_tokens=2
        )
    assert later.shape[1] == longer.shape[1] + 2
    assert len(trace.samples) == 1


def test_a_method_may_merge_and_see_nothing_else():
    class Blind(ToMe):
        sees = Tower(merge=True)

        def choose(self, seen, counts, state):
            position = torch.arange(max(counts)).repeat(len(counts), 1)
            return Selection(position, list(counts))

    model = build()
    with entering(model) as counts:
        run(model, Blind(4), zoo.inputs("llava", model))
    assert counts == [17, 14, 11, 9, 7, 17]


@pytest.mark.parametrize(
    ("joining", "message"),
    [
        (lambda into: into.tolist(), r"a LongTensor \[1, 16\], .* got list"),
        (lambda into: into.float(), r"got torch.float32 \[1, 16\]"),
        (lambda into: into[:, :-1], r"got torch.int64 \[1, 15\]"),
        # Nobody goes; all go to the first; two go round in a circle; one goes nowhere.
        (lambda into: torch.arange(16)[None], r"exactly 3 of 16 tokens .* it let \[0\] join"),
        (lambda into: torch.zeros_like(into), r"it let \[15\] join"),
        (lambda into: torch.tensor([[1, 0, 3, *range(3, 16)]]), "join one that leaves"),
        (lambda into: torch.tensor([[16, 16, 16, *range(3, 16)]]), "or does not exist"),
    ],
)
def test_what_a_methods_merge_returns_is_checked(joining, message):
    class Wrong(ToMe):
        def merge(self, seen, leaving):
            return joining(super().merge(seen, leaving))

    model = build()
    with pytest.raises(ValueError, match=message):
        run(model, Wrong(4), zoo.inputs("llava", model))


def test_a_cls_token_among_the_visual_tokens_is_a_group_of_its_own():
    model = build(vision_feature_select_strategy="full")
    arguments = zoo.inputs("llava", model)
    del arguments["attention_mask"]
    arguments["input_ids"] = torch.tensor([[zoo.BOS, *[zoo.IMAGE] * 17, 5, 6]])
    spy = Shown(ToMe(4))
    with entering(model) as counts:
        (sample,) = run(model, spy, arguments)
    assert counts == [17, 14, 11, 9, 7, 17]
    assert sample.tokens_per_layer == [4] * zoo.LAYERS
    (numbers,) = spy.seen[0].vision_groups
    assert len(numbers.unique()) == 7
    assert (numbers == numbers[0]).sum() == 1


def everything_in(model):
    return {
        name: (list(m._forward_pre_hooks), list(m._forward_hooks), sorted(m.__dict__))
        for name, m in model.named_modules()
    } | {"attention": dict(ALL_ATTENTION_FUNCTIONS)}


def test_leaving_restores_the_tower_also_after_an_exception_in_it():
    model = build()
    arguments = zoo.inputs("llava", model)
    with torch.no_grad():
        plain = model(**arguments).logits
        before = everything_in(model)
        with ToMe(4)(model):
            pruned = model(**arguments).logits
            model.generate(**arguments, max_new_tokens=1)
        assert everything_in(model) == before
        assert not torch.equal(pruned[:, -1], plain[:, -1])
        handle = blocks_of(model)[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), ToMe(4)(model):
            model(**arguments)
        handle.remove()
        assert everything_in(model) == before
        assert torch.equal(model(**arguments).logits, plain)


def test_an_exception_in_the_tower_leaves_nothing_for_the_next_prompt():
    model = build()
    arguments = zoo.inputs("llava", model)
    with torch.no_grad(), ToMe(4)(model):
        expected = model(**arguments).logits
        handle = blocks_of(model)[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**arguments)
        handle.remove()
        with entering(model) as counts:
            tower_of(model)(arguments["pixel_values"])
            model.model.get_image_features(arguments["pixel_values"])
        assert set(counts) == {17}
        assert torch.equal(model(**arguments).logits, expected)


def test_threads_in_one_tower_keep_to_their_own_pictures():
    model, method = build(), ToMe(6)
    one, other = (zoo.inputs("llava", model, "padded3", only=row) for row in (0, 2))
    inside, done = threading.Event(), threading.Event()
    logits = {}
    with torch.no_grad(), method(model):
        expected = model(**one).logits, model(**other).logits

        def pause(*_):
            if threading.current_thread() is first:
                inside.set()
                done.wait(timeout=30)

        def answer():
            with torch.no_grad():
                logits["one"] = model(**one).logits

        first = threading.Thread(target=answer)
        handle = blocks_of(model)[2].register_forward_pre_hook(pause)
        first.start()
        assert inside.wait(timeout=30)
        logits["other"] = model(**other).logits
        done.set()
        first.join()
        handle.remove()
    assert torch.equal(logits["one"], expected[0])
    assert torch.equal(logits["other"], expected[1])


@pytest.mark.parametrize(
    "generation", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}]
)
def test_copies_of_a_prompt_keep_what_it_keeps(generation):
    model = build()
    arguments = zoo.inputs("llava", model, "padded3_text")
    with torch.no_grad(), ToMe(5)(model) as trace:
        model.generate(**arguments, max_new_tokens=2, pad_token_id=zoo.PAD, **generation)
    assert [s.tokens_per_layer[0] for s in trace.samples] == [5, 5, 0, 0, 5, 5]
    for copies in zip(trace.samples[::2], trace.samples[1::2], strict=True):
        assert torch.equal(copies[0].kept[0], copies[1].kept[0])


def test_generate_and_a_forward_keep_the_same():
    model, spy = build(), Shown(autoprune.create("turbo", Budget.ratio(0.4)))
    arguments = zoo.inputs("llava", model, "padded3_text")
    with spy(model), torch.no_grad():
        oracle.generate_logits(model, arguments, steps=1)
        model(**arguments)
    generated, forward = spy.seen
    assert torch.equal(generated.vision_groups.isnan(), forward.vision_groups.isnan())
    assert torch.equal(generated.vision_groups.nan_to_num(), forward.vision_groups.nan_to_num())
