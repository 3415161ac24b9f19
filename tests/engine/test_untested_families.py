"""A family outside the table is pruned with a warning if it can be, and refused if it cannot."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import transformers

from autoprune import AutoPrune, Budget
from autoprune.errors import UnsupportedError
from tests import oracle, zoo
from tests.scattered import DEEP, Scattered

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


def of_tomorrow():
    """A model like LLaVA whose type nobody knows."""
    model = skeleton(
        transformers.LlavaConfig(
            text_config=TEXT | {"model_type": "llama"},
            vision_config=TOWER | {"model_type": "clip_vision_model", "num_hidden_layers": 2},
        )
    )
    model.config.model_type = "llava_of_tomorrow"
    return model


def mllama():
    """Some of its layers look at the picture by cross-attention."""
    tower = {"attention_heads": 2, "num_hidden_layers": 1, "num_global_layers": 1}
    return transformers.MllamaConfig(
        text_config=TEXT | {"cross_attention_layers": [1]},
        vision_config=TOWER | tower | {"intermediate_layers_indices": [0]},
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
    model = of_tomorrow()
    (caught,) = warnings_of(lambda: enter(model))
    assert "'llava_of_tomorrow' is not among the families" in str(caught.message)
    assert "docs/families.md" in str(caught.message)
    assert caught.filename == __file__


def test_a_warning_made_an_error_leaves_nothing_behind():
    model = of_tomorrow()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="llava_of_tomorrow"):
            METHOD.attach(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert len(warnings_of(lambda: enter_context(model))) == 1


@pytest.mark.parametrize("name", [*zoo.FAMILIES, *zoo.CORE])
def test_tested_families_do_not_warn(name):
    model = model_of(name, zoo.family_of(name).attentions[0])
    assert warnings_of(lambda: enter_context(model)) == []


def test_a_decoder_that_breaks_the_conventions_is_refused():
    with pytest.raises(UnsupportedError, match="takes cross_attention_mask"):
        METHOD(skeleton(mllama()))


def test_an_argument_that_may_follow_the_sequence_is_refused():
    model = zoo.build("llava", "sdpa")
    layer = model.get_decoder().layers[3]

    class WithInputs(type(layer)):
        def forward(self, hidden_states, layer_inputs, attention_mask, past_key_values):
            raise NotImplementedError

    layer.__class__ = WithInputs
    with pytest.raises(UnsupportedError, match="WithInputs takes layer_inputs"):
        METHOD(model)


def test_several_states_of_a_token_are_refused():
    """As Gemma 3n has them."""
    model = zoo.build("llava", "sdpa")
    for layer in model.get_decoder().layers:
        layer.altup = torch.nn.Identity()
    with pytest.raises(UnsupportedError, match=r"keeps several states of every token \(AltUp\)"):
        METHOD(model)


COMPLEX = {
    # Their rotary embeddings are one complex tensor.
    "deepseek_v2": {
        "head_dim": 8,
        "num_key_value_heads": zoo.HEADS,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "llama4_text": {
        "intermediate_size_mlp": 64,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "layer_types": ["full_attention"] * zoo.LAYERS,
        "attn_temperature_tuning": False,
    },
}


def llava_with(text, **changes):
    """A tiny LLaVA with another decoder, its weights as the zoo draws them."""
    config = zoo.FAMILIES["llava"].config()
    settings = config.text_config.to_dict()
    own = {
        name: settings[name]
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "pad_token_id",
        )
    }
    config.text_config = transformers.AutoConfig.for_model(text, **own | changes)
    model = transformers.LlavaForConditionalGeneration._from_config(config)
    zoo.randomise(model, 0)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*is not among the families")
@pytest.mark.parametrize("positions", ["original", "compacted"])
@pytest.mark.parametrize("batch", ["single", "padded3"])
@pytest.mark.parametrize("text", COMPLEX)
def test_rotary_embeddings_in_one_complex_tensor_are_cut(text, batch, positions):
    model = llava_with(text, **COMPLEX[text])
    arguments = zoo.inputs("llava", model, batch)
    method = Scattered(DEEP, positions=positions)
    with method(model) as trace, torch.no_grad():
        actual = model(**arguments).logits[:, -1]
    columns = oracle.columns_from_trace(trace.samples, arguments["attention_mask"], zoo.LAYERS)
    expected = oracle.oracle_forward(model, arguments, columns, positions)[:, -1]
    plain = oracle.plain_logits(model, arguments)[:, -1]
    torch.testing.assert_close(actual, expected, atol=3e-4, rtol=0)
    assert (plain - expected).abs().max() > 1.0


@pytest.mark.filterwarnings("ignore:.*is not among the families")
@pytest.mark.parametrize("text", COMPLEX)
def test_they_decode_as_the_oracle_does(text):
    model = llava_with(text, **COMPLEX[text])
    arguments = zoo.inputs("llava", model)
    result = oracle.compare(model, arguments, AutoPrune(Budget.ratio(0.5)), steps=3)
    assert result.worst < 3e-4


@pytest.mark.parametrize("kind", ["indexed_attention", "linear_attention"])
def test_a_layer_of_an_unknown_type_is_refused(kind):
    model = zoo.build("llava")
    model.get_decoder().config.layer_types = ["full_attention", kind] * (zoo.LAYERS // 2)
    with pytest.raises(UnsupportedError) as caught:
        METHOD(model)
    assert str(caught.value) == (
        f"LlamaModel has layers of type {kind}, but only the masks of full_attention, sliding_attention and "
        "chunked_attention are known; this decoder is not supported: take a model of a family that `autoprune "
        "families` lists, or see docs/families.md"
    )


def test_a_decoder_without_a_list_of_layers_of_its_own_is_refused():
    model = zoo.build("llava")
    model.get_decoder().config.num_hidden_layers = 5
    with pytest.raises(UnsupportedError) as caught:
        METHOD(model)
    assert str(caught.value).startswith(
        "LlamaModel does not hold the list of its 5 layers itself, by which a decoder is known; this decoder "
        "is not supported: take a model of a family that `autoprune families` lists"
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("UnlimitedOcrConfig", "has layers of type reference_sliding_attention"),
        ("Dots3NoteConfig", "has layers of type indexed_attention"),
    ],
)
def test_newer_kinds_of_attention_are_refused(name, reason):
    config = getattr(transformers, name, None)
    if config is None:
        pytest.skip(f"this transformers has no {name}")
    with pytest.raises(UnsupportedError, match=reason):
        METHOD(skeleton(config()))


def test_layers_that_are_configured_one_by_one_are_refused():
    model = llava_with("mistral", per_layer_config={1: {"sliding_window": 4}})
    with pytest.raises(UnsupportedError) as caught:
        METHOD(model)
    assert str(caught.value).startswith(
        "the layers of MistralModel are configured one by one, but pruning needs them alike ('sliding_window' "
        "is a per-layer attribute"
    )
