"""A family outside the table is pruned with a warning if it can be, and refused if it cannot."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import transformers

from autoprune import AutoPrune
from autoprune.errors import UnsupportedError
from tests import zoo

METHOD = AutoPrune(budget=8)
model_of = functools.cache(zoo.build)
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}


def vipllava():
    return transformers.VipLlavaConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=TOWER | {"model_type": "clip_vision_model", "num_hidden_layers": 2},
        vision_feature_layer=[-1, -2],
    )


def mllama():
    """Some of its layers look at the picture by cross-attention."""
    tower = {"attention_heads": 2, "num_hidden_layers": 1, "num_global_layers": 1}
    return transformers.MllamaConfig(
        text_config=TEXT | {"cross_attention_layers": [1]},
        vision_config=TOWER | tower | {"intermediate_layers_indices": [0]},
    )


def lfm2_vl():
    """Some of its layers are convolutions over the sequence."""
    return transformers.Lfm2VlConfig(
        text_config=TEXT | {"model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 2},
        vision_config=TOWER | {"model_type": "siglip2_vision_model", "num_hidden_layers": 1},
    )


def skeleton(config):
    """The modules of a model, without memory for its weights."""
    with torch.device("meta"):
        return transformers.AutoModelForImageTextToText.from_config(config).eval()


def warnings_of(enter):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        enter()
    return [w for w in caught if w.category is UserWarning and "autoprune" in str(w.message)]


def enter_context(model):
    with METHOD(model):
        pass


def enter_by_hand(model):
    METHOD.attach(model).detach()


@pytest.mark.parametrize("enter", [enter_context, enter_by_hand])
def test_an_untested_family_is_pruned_with_one_warning_at_the_callers_line(enter):
    model = skeleton(vipllava())
    (caught,) = warnings_of(lambda: enter(model))
    assert "'vipllava' is not among the families" in str(caught.message)
    assert "docs/families.md" in str(caught.message)
    assert caught.filename == __file__


def test_a_warning_made_an_error_leaves_nothing_behind():
    model = skeleton(vipllava())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="vipllava"):
            METHOD.attach(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert len(warnings_of(lambda: enter_context(model))) == 1


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_tested_families_do_not_warn(name):
    model = model_of(name, zoo.FAMILIES[name].attentions[0])
    assert warnings_of(lambda: enter_context(model)) == []


@pytest.mark.parametrize(
    ("config", "reason"),
    [(mllama, "takes cross_attention_mask"), (lfm2_vl, "no causal self-attention")],
)
def test_a_decoder_that_breaks_the_conventions_is_refused(config, reason):
    with pytest.raises(UnsupportedError, match=reason):
        METHOD(skeleton(config()))


def test_an_argument_that_may_follow_the_sequence_is_refused():
    model = zoo.build("llava", "sdpa")
    layer = model.get_decoder().layers[3]

    class WithInputs(type(layer)):
        def forward(self, hidden_states, per_layer_input, attention_mask, past_key_values):
            raise NotImplementedError

    layer.__class__ = WithInputs
    with pytest.raises(UnsupportedError, match="WithInputs takes per_layer_input"):
        METHOD(model)
