"""What a cut leaves, against a model of it with one plain list of tokens per prompt."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.contract import Merged, Selection
from autoprune.engine.tokens.cut import Plan
from autoprune.engine.tokens.layout import Layout
from autoprune.engine.tokens.merged import cut_and_merge
from autoprune.engine.tokens.present import NEW, Tokens
from autoprune.engine.tokens.sizes import Sizes

CPU = torch.device("cpu")
TEXT = "text"


@st.composite
def layouts(draw):
    """Batches of prompts with pictures anywhere, padded anywhere."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    kinds = st.lists(st.sampled_from("ptvv"), min_size=length, max_size=length)
    kinds = kinds.filter(lambda row: set(row) != {"p"})
    rows = np.array(draw(st.lists(kinds, min_size=batch, max_size=batch)))
    return Layout(rows != "p", rows == "v")


def as_lists(layout):
    """For each prompt, its tokens as (column, visual index or TEXT)."""
    prompts = []
    for real, visual in zip(layout.real, layout.visual, strict=True):
        index = iter(range(int(visual.sum())))
        prompts.append(
            [(c, next(index) if visual[c] else TEXT) for c in np.flatnonzero(real).tolist()]
        )
    return prompts


def draw_cut(data, prompts):
    """A selection, and what it makes of each prompt; sources are places, "new" and a number if merged."""
    merging = any(kind != TEXT for p in prompts for _, kind in p) and data.draw(st.booleans())
    behind = merging and data.draw(st.booleans())
    kept, places, results = [], [], []
    for tokens in prompts:
        visual = [i for i, (_, kind) in enumerate(tokens) if kind != TEXT]
        chosen = [j for j in range(len(visual)) if data.draw(st.booleans())]
        gone = [j for j in range(len(visual)) if j not in chosen]
        heirs = [j for j in gone if merging and data.draw(st.booleans())]
        heirs = data.draw(st.permutations(heirs))
        survivors = {visual[j] for j in chosen}
        result = []
        for i, token in enumerate(tokens):
            if token[1] == TEXT or i in survivors:
                result.append((token, i))
            elif not behind and visual.index(i) in heirs:
                result.append(((token[0], NEW), ("new", heirs.index(visual.index(i)))))
            if behind and visual and i == visual[-1]:
                result += [((token[0], NEW), ("new", n)) for n in range(len(heirs))]
        kept.append(chosen)
        places.append(heirs)
        results.append(result)
    merged = None
    if merging:
        width = max(map(len, places))
        place = torch.tensor([row + [0] * (width - len(row)) for row in places]).view(
            len(prompts), width
        )
        counts = [len(row) for row in places]
        hidden = torch.zeros(len(prompts), width, 1)
        merged = Merged(hidden, counts, None if behind else place.long())
    width = max(map(len, kept))
    padded = (
        torch.tensor([row + [-1] * (width - len(row)) for row in kept])
        .view(len(prompts), width)
        .long()
    )
    return Selection(padded, [len(row) for row in kept], merged), results


def check(tokens, prompts):
    """That Tokens say of each prompt what its list says."""
    assert tokens.lengths == [len(p) for p in prompts]
    assert tokens.counts == [sum(kind != TEXT for _, kind in p) for p in prompts]
    assert tokens.padded == (min(tokens.lengths) < tokens.width)
    assert tokens.slots.shape == tokens.index.shape == (len(prompts), max(tokens.counts))
    for row, prompt in enumerate(prompts):
        where = (tokens.column[row] >= 0).nonzero().squeeze(1)
        assert tokens.column[row][where].tolist() == [column for column, _ in prompt]
        kinds = [kind for _, kind in prompt]
        text = [where[i].item() for i, kind in enumerate(kinds) if kind == TEXT]
        assert [place for place in tokens.text[row].tolist() if place >= 0] == text
        visual = [where[i].item() for i, kind in enumerate(kinds) if kind != TEXT]
        mask = tokens.slot_mask[row]
        assert mask.tolist() == [i < len(visual) for i in range(max(tokens.counts))]
        assert tokens.slots[row][mask].tolist() == visual
        assert tokens.index[row][mask].tolist() == [kind for kind in kinds if kind != TEXT]
        assert (tokens.index[row][~mask] == -1).all()
    if tokens.block is not None:
        assert all(row == list(range(*tokens.block.indices(99))) for row in tokens.slots.tolist())
    # Padding is gathered with, too.
    assert ((tokens.slots >= 0) & (tokens.slots < max(tokens.width, 1))).all()


def cut(tokens, selection):
    """One cut, not packed; sources are places in each prompt."""
    if selection.merged is not None:
        return cut_and_merge(tokens, selection)
    sizes = Sizes(tokens, None, np.array([selection.counts]), may_pack=False)
    (made,) = Plan(tokens, None, tokens.ranks_of(selection.kept), sizes, range(1)).cuts([1])
    source = made.source.view(tokens.batch, -1)
    prompt, place = source // max(tokens.width, 1), source % max(tokens.width, 1)
    assert (prompt == torch.arange(tokens.batch)[:, None]).all()
    return made.stage.tokens, place


@settings(max_examples=100, deadline=None)
@given(layouts(), st.data())
def test_cuts_leave_what_they_say(layout, data):
    tokens, prompts = Tokens.of(layout, CPU), as_lists(layout)
    check(tokens, prompts)
    for _ in range(2):
        selection, results = draw_cut(data, prompts)
        before, (tokens, source) = tokens, cut(tokens, selection)
        was = [(row >= 0).nonzero().squeeze(1).tolist() for row in before.column]
        prompts = [[token for token, _ in result] for result in results]
        check(tokens, prompts)
        assert tokens.was_cut and tokens.width == max(tokens.lengths)
        for row, result in enumerate(results):
            first = tokens.width - len(result)
            wanted = [
                before.width + place[1] if isinstance(place, tuple) else was[row][place]
                for _, place in result
            ]
            assert source[row, first:].tolist() == wanted
            assert (tokens.column[row, :first] == -1).all()
        assert (source >= 0).all()
        values = torch.arange(1, 1 + tokens.slots.numel()).view(tokens.slots.shape)
        spread = tokens.spread(values, torch.zeros_like(tokens.column))
        for row, count in enumerate(tokens.counts):
            assert spread[row][spread[row] > 0].tolist() == values[row, :count].tolist()


@settings(max_examples=100, deadline=None)
@given(layouts(), st.booleans(), st.data())
def test_cuts_of_one_ranking_are_those_made_one_by_one(layout, may_pack, data):
    """Two rankings of up to three cuts each; hidden states are the columns, 100 more for each prompt."""
    tokens, packing, prompts = Tokens.of(layout, CPU), None, as_lists(layout)
    batch = len(prompts)
    hidden = (torch.arange(tokens.width) + 100 * torch.arange(batch)[:, None]).flatten()
    rotary = torch.arange(batch * tokens.width).view(batch, -1)
    shared = torch.arange(tokens.width)[None]
    falls = st.integers(0, 2)
    counts = [
        list(np.maximum(n - np.cumsum([data.draw(falls) for _ in range(6)]), 0))
        for n in tokens.counts
    ]
    sizes = Sizes(tokens, None, np.array(counts).T, may_pack)
    for depths in (range(3), range(3, 6)):
        order = torch.zeros(batch, max(tokens.counts), dtype=torch.long)
        ranked = []
        for row, n in enumerate(tokens.counts):
            ranked.append(data.draw(st.permutations(range(n))))
            order[row] = torch.tensor([*ranked[-1], *range(n, max(tokens.counts))])
        plan = Plan(tokens, packing, tokens.ranks(order), sizes, depths)
        visual = [[i for i, (_, kind) in enumerate(p) if kind != TEXT] for p in prompts]
        for depth, made in zip(depths, plan.cuts([4, 5, 6]), strict=True):
            kept = [
                {v[i] for i in ranks[: own[depth]]}
                for v, ranks, own in zip(visual, ranked, counts, strict=True)
            ]
            left = [
                [token for i, token in enumerate(p) if token[1] == TEXT or i in stay]
                for p, stay in zip(prompts, kept, strict=True)
            ]
            stage = made.stage
            check(stage.tokens, left)
            hidden, tokens, packing = hidden[made.source], stage.tokens, stage.packing
            blocked = tokens.padding_mask(torch.float32) < 0
            assert torch.equal(blocked, tokens.column < 0)
            shown = hidden[None] if packing else hidden.view(batch, -1)
            wanted = [torch.tensor([c + 100 * i for c, _ in p]) for i, p in enumerate(left)]
            own = stage.columns.take(rotary, rotary, -1)[stage.rows]
            same = stage.columns.take(shared, shared, -1)[stage.rows]
            if packing:
                assert shown[0].tolist() == torch.cat(wanted).tolist()
                padded = packing.unpack(shown)
                assert packing.pack(padded).tolist() == shown.tolist()
                assert own.tolist() == [
                    int(h) // 100 * rotary.shape[1] + int(h) % 100 for h in hidden
                ]
                assert same.tolist() == [int(h) % 100 for h in hidden]
            else:
                padded = shown
            for row, values in enumerate(wanted):
                first = tokens.width - len(values)
                assert padded[row, first:].tolist() == values.tolist()
                # Padding holds a token of the same prompt.
                assert not len(values) or (padded[row, :first] // 100 == row).all()
        prompts = left


def test_one_picture_at_the_same_place_is_one_block():
    visual = np.array([[False, True, True, True, False]] * 2)
    tokens = Tokens.of(Layout(np.ones_like(visual), visual), CPU)
    assert tokens.block == slice(1, 4)
    even = Selection(torch.tensor([[0, 2], [1, 2]]), [2, 2])
    assert cut(tokens, even)[0].block == slice(1, 3)
    ragged = Selection(torch.tensor([[0, 2], [1, -1]]), [2, 1])
    assert cut(tokens, ragged)[0].block is None
    split = np.array([[False, True, False, True, False]])
    assert Tokens.of(Layout(np.ones_like(split), split), CPU).block is None
