"""What a look shows is what the plain model's own attention says, in every layer and family."""

from __future__ import annotations

import pytest
import torch

import autoprune
from autoprune.methods.looking import look
from tests import zoo


def eager(model, inputs):
    """[L, N] by the plain model: its whole attention, cut to the text behind the picture."""
    model.set_attn_implementation("eager")
    visual = zoo.visual_mask(model, inputs["input_ids"])[0].nonzero().flatten().tolist()
    rows = range(visual[-1] + 1, inputs["input_ids"].shape[1])
    with torch.no_grad():
        layers = model(**inputs, output_attentions=True).attentions
    return torch.stack(
        [
            torch.stack([sum(layer[0, :, row, column].mean() for row in rows) for column in visual])
            / len(rows)
            for layer in layers
        ]
    )


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "idefics3", "gemma3"])
def test_attention_is_that_of_a_plain_eager_forward(family):
    model = zoo.build(family)
    inputs = zoo.inputs(family, model)
    seen = look(model, inputs)
    assert len(seen.attention) == zoo.LAYERS
    torch.testing.assert_close(seen.attention, eager(model, inputs), atol=2e-6, rtol=1e-4)


def test_a_look_leaves_the_model_as_it_was():
    model = zoo.build("llava")
    inputs = zoo.inputs("llava", model)
    before = model(**inputs).logits
    look(model, inputs)
    assert torch.equal(model(**inputs).logits, before)


def test_a_look_takes_one_prompt_with_a_picture():
    model = zoo.build("llava")
    with pytest.raises(ValueError, match="one prompt, got a batch of 3"):
        look(model, zoo.inputs("llava", model, "padded3"))
    with pytest.raises(ValueError, match="no picture"):
        look(model, {"input_ids": torch.tensor([[1, 5, 6, 7]])})


def test_it_is_no_method_that_users_choose():
    assert "looking" not in autoprune.list_methods()
