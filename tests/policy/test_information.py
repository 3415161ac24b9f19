"""Mutual information: the normalised form by its properties, the released form by its data."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoprune.policy.information import (
    mutual_information,
    released_mutual_information,
    visual_spread,
)
from tests.golden_data import golden_functions
from tests.policy.examples import examples


def by_definition(block: torch.Tensor) -> float:
    """Two loops over one [text, visual] block in double precision."""
    values = block.double().tolist()
    mass = math.fsum(map(math.fsum, values))
    if mass == 0:
        return 0.0
    rows = [math.fsum(row) / mass for row in values]
    columns = [math.fsum(column) / mass for column in zip(*values, strict=True)]
    return math.fsum(
        value / mass * math.log2(value / mass / (rows[i] * columns[j]))
        for i, row in enumerate(values)
        for j, value in enumerate(row)
        if value > 0
    )


@st.composite
def attention_blocks(draw: st.DrawFn) -> torch.Tensor:
    """[batch, heads, text, visual] from flat to peaky, some with exact zeros."""
    shape = [draw(st.integers(1, high)) for high in (3, 3, 12, 24)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.0, 0.1, 1.0, 8.0]))
    attention = logits.softmax(-1) * draw(st.sampled_from([1.0, 0.3, 1e-3]))
    if draw(st.booleans()):
        attention = attention * (torch.rand(shape, generator=generator) > 0.5)
    return attention


@examples(150)
@given(attention_blocks())
def test_equals_the_definition_within_its_bounds(attention):
    bits = mutual_information(attention)
    assert bits.dtype == torch.float32
    assert bits.shape == attention.shape[:2]
    expected = [[by_definition(block) for block in heads] for heads in attention]
    torch.testing.assert_close(bits, torch.tensor(expected), rtol=1e-5, atol=2e-6)
    assert (bits >= 0).all()
    assert (bits <= math.log2(min(attention.shape[-2:])) + 1e-5).all()


@examples(60)
@given(attention_blocks(), st.integers(0, 2**31))
def test_is_invariant_to_scale_and_order(attention, seed):
    generator = torch.Generator().manual_seed(seed)
    text, visual = attention.shape[-2:]
    shuffled = attention[..., torch.randperm(text, generator=generator), :]
    shuffled = shuffled[..., torch.randperm(visual, generator=generator)]
    bits = mutual_information(attention)
    torch.testing.assert_close(mutual_information(shuffled), bits, rtol=1e-5, atol=2e-6)
    for scale in (1e-4, 3.0, 1e4):
        torch.testing.assert_close(
            mutual_information(attention * scale), bits, rtol=1e-5, atol=2e-6
        )


@examples(60)
@given(attention_blocks(), st.data())
def test_masks_equal_slicing(attention, data):
    batch, _, text, visual = attention.shape
    text_mask = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.booleans(), min_size=text, max_size=text),
                min_size=batch,
                max_size=batch,
            )
        )
    )
    visual_mask = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.booleans(), min_size=visual, max_size=visual),
                min_size=batch,
                max_size=batch,
            )
        )
    )
    padded = attention.clone()
    padded.masked_fill_(~text_mask[:, None, :, None], float("nan"))
    padded.masked_fill_(~visual_mask[:, None, None, :], float("inf"))
    masked = mutual_information(padded, text_mask, visual_mask)
    for row in range(batch):
        sliced = attention[row][:, text_mask[row]][:, :, visual_mask[row]]
        torch.testing.assert_close(masked[row], mutual_information(sliced), rtol=1e-5, atol=2e-6)


def test_identical_rows_carry_no_information():
    row = torch.rand(40, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.1, 0.7, 0.2])[:, None]
    assert mutual_information(weights * row).item() < 1e-6


def test_identity_carries_log2_of_its_size():
    for size in (1, 2, 7, 32):
        assert mutual_information(torch.eye(size)).item() == pytest.approx(
            math.log2(size), abs=1e-5
        )


def test_a_block_without_mass_gives_zero():
    attention = torch.zeros(2, 3, 4, 5)
    attention[1] = torch.eye(4, 5)
    bits = mutual_information(attention)
    assert bits[0].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(bits[1], torch.full((3,), 2.0))
    everything_masked = torch.zeros(2, 4, dtype=torch.bool)
    assert mutual_information(attention, everything_masked).eq(0).all()


def test_does_not_grow_with_the_number_of_heads():
    block = torch.rand(1, 1, 6, 9, generator=torch.Generator().manual_seed(3))
    one, many = mutual_information(block), mutual_information(block.expand(1, 16, 6, 9))
    torch.testing.assert_close(many.mean(1), one.mean(1))


def test_extreme_values_stay_finite():
    attention = torch.tensor([[1.0, 1e-38], [1e-38, 1e-42]])
    assert mutual_information(attention).item() == pytest.approx(0.0, abs=1e-6)


def test_half_precision_is_computed_in_float32_and_double_in_double():
    attention = torch.rand(8, 20, generator=torch.Generator().manual_seed(1))
    half = mutual_information(attention.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, mutual_information(attention.half().float()))
    double = mutual_information(attention.double())
    assert double.dtype == torch.float64
    assert double.item() == pytest.approx(by_definition(attention), abs=1e-12)


def test_refuses_what_does_not_fit():
    attention = torch.rand(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"attention must be \[..., text, visual\]"):
        mutual_information(torch.rand(5))
    with pytest.raises(ValueError, match=r"text_mask must be a bool tensor of shape \[2, 4\]"):
        mutual_information(attention, torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="visual_mask must be a bool tensor"):
        mutual_information(attention, None, torch.ones(2, 5))
    with pytest.raises(ValueError, match="at least one text row"):
        released_mutual_information(torch.rand(3, 0, 5))


TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "float16": 2e-3}


@pytest.mark.parametrize("entry", golden_functions("mutual_information"), ids=lambda e: e["name"])
def test_released_form_matches_the_released_code(entry):
    attention = torch.tensor(entry["attn"], dtype=getattr(torch, entry["dtype"]))
    result = released_mutual_information(attention)
    assert result.dtype == attention.dtype
    assert result.item() == pytest.approx(entry["mi"], abs=TOLERANCE[entry["dtype"]])


def test_released_form_is_batched():
    attention = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
    expected = torch.stack(
        [torch.stack([released_mutual_information(h) for h in b]) for b in attention]
    )
    torch.testing.assert_close(released_mutual_information(attention), expected)


def test_spread_worked_out_by_hand():
    # Two heads of two rows; their sum over both is 4, 2, 2 of 8.
    attention = torch.tensor([[[[2.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [1, 0, 1]]]])
    participation, entropy = visual_spread(attention)[0].tolist()
    assert participation == pytest.approx(1 / (0.25 + 2 / 16))
    assert entropy == pytest.approx(1.5)
    # Without the second row 3, 1, 0 of 4; without the last column, too.
    text, visual = torch.tensor([[True, False]]), torch.tensor([[True, True, False]])
    for found in (visual_spread(attention, text), visual_spread(attention, text, visual)):
        assert found[0].tolist() == pytest.approx([1.6, 2 - 0.75 * math.log2(3)])


def test_spread_ends_at_one_token_and_at_all():
    one, all_alike = torch.zeros(1, 2, 3, 8), torch.full((1, 2, 3, 8), 0.1)
    one[..., 5] = 0.3
    found = visual_spread(torch.cat([one, all_alike])).flatten().tolist()
    assert found == pytest.approx([1, 0, 8, 3], abs=1e-5)
    assert visual_spread(torch.zeros(1, 2, 3, 8)).tolist() == [[0.0, 0.0]]
