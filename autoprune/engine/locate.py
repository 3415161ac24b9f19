"""Find the parts of a vision-language model by transformers' own conventions, without a table of families."""

from __future__ import annotations

import functools
import inspect
import warnings
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from transformers.integrations.heterogeneity.configuration_utils import (
    AmbiguousGlobalPerLayerAttributeError as DiffersByLayer,
)

from ..errors import UnsupportedError
from ..families import MODEL_TYPES
from ..policy.cost import DecoderCost
from ..policy.dimensions import RECURRENT_TYPES
from .cache import argument as cache_argument

NOT_SUPPORTED = (
    "this decoder is not supported: take a model of a family that `autoprune families` lists, or see "
    "docs/families.md"
)

# Kinds of attention layers whose masks are known here.
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")

# Gemma 4: an input of its own that each layer has for every token, and the keys and values of earlier layers.
PER_LAYER_INPUT, SHARED_KEYS = "per_layer_input", "shared_kv_states"

# What decoder layers may take: an argument that is not here may follow the sequence and miss a cut.
LAYER_ARGUMENTS = {
    "hidden_states",
    "attention_mask",
    "position_embeddings",
    "position_ids",
    *cache_argument.NAMES,
    "use_cache",
    "output_attentions",
    PER_LAYER_INPUT,
    SHARED_KEYS,
}


@dataclass(frozen=True)
class Window:
    """What a layer sees of the tokens before a new one.

    size: so many, itself included; where `chunked`, those of its own chunk, of which each has so many.
    """

    size: int
    chunked: bool = False

    def binds(self, columns: int) -> bool:
        """Whether a token sees less than all in a prompt of so many columns."""
        return columns > self.size


# A model of transformers, or its decoder: what else they have differs by family.
Model = Any


@dataclass(frozen=True)
class Located:
    """The parts of one model that pruning touches.

    outer: the model with its language-model head.
    base: the module that merges image features into the prompt (it sees `input_ids`).
    text: the decoder stack (it sees `inputs_embeds`, the cache and the positions); layers: its layers.
    attentions: the attention module of each decoder layer; None where a layer passes a state on instead.
    vision: the vision tower; visual_ids: token ids that stand for image or video features.
    reads: the earlier layer whose keys and values each decoder layer attends to; None where it has its own.
    windows: what each decoder layer sees of the tokens before a new one; None where it sees all.
    """

    outer: Model
    base: Model
    text: Model
    layers: list[nn.Module]
    attentions: list[nn.Module | None]
    vision: nn.Module
    visual_ids: tuple[int, ...]
    reads: list[int | None]
    windows: list[Window | None]
    cost: DecoderCost

    @property
    def attending(self) -> list[nn.Module]:
        """The attention modules of the layers that have one."""
        return [attention for attention in self.attentions if attention is not None]

    @property
    def attending_layers(self) -> tuple[bool, ...] | None:
        """Whether each layer attends; None if all do."""
        if not self.is_hybrid:
            return None
        return tuple(attention is not None for attention in self.attentions)

    @property
    def is_hybrid(self) -> bool:
        """Whether some layers pass a state on instead of attending."""
        return None in self.attentions

    @property
    def shares_keys(self) -> bool:
        """Whether some layers attend to the keys and values of earlier ones."""
        return any(read is not None for read in self.reads)

    @property
    def implementation(self) -> str:
        """The decoder's attention backend: "sdpa", "eager", ..."""
        return self.text.config._attn_implementation

    def present_cost(self) -> DecoderCost:
        """`cost` in the decoder's present dtype: the model may have been cast since it was located."""
        size = _element_size(self.text)
        return self.cost if size == self.cost.dtype_bytes else replace(self.cost, dtype_bytes=size)


def locate(model: Model) -> Located:
    """Locate the decoder, its layers and the vision tower of `model`.

    Raises:
        UnsupportedError: `model` is no vision-language model whose decoder follows the conventions of
            transformers 5.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_decoder"):
        raise UnsupportedError(
            f"{type(model).__name__} is not a transformers model: pass what "
            "AutoModelForImageTextToText.from_pretrained returns"
        )
    visual_ids = tuple(
        token
        for name in ("image_token_id", "image_token_index", "video_token_id")
        if isinstance(token := getattr(config, name, None), int)
    )
    base = model.base_model
    vision = model.get_encoder(modality="image") if visual_ids else None
    if vision is None or vision is model or vision is base:
        raise UnsupportedError(
            f"{type(model).__name__} has no image token id (config.image_token_id) or no vision tower that is "
            "found; if AutoModelForImageTextToText loaded it, its family is not supported (docs/families.md)"
        )
    text = model.get_decoder()
    if not _stacks(text) and hasattr(text, "lm_head"):
        # Llama 4 has a whole causal language model in this place.
        text = text.model
    try:
        return _located(model, base, text, vision, visual_ids)
    except DiffersByLayer as error:
        raise UnsupportedError(
            f"the layers of {type(text).__name__} are configured one by one, but pruning needs them alike "
            f"({str(error).partition('.')[0]}); {NOT_SUPPORTED}"
        ) from error


def _located(
    model: Model,
    base: Model,
    text: Model,
    vision: nn.Module,
    visual_ids: tuple[int, ...],
) -> Located:
    layers = _layers(text)
    windows = _windows(text, len(layers))
    kinds = getattr(text.config, "layer_types", None) or [None] * len(layers)
    attentions = [
        _attention(layer) if _attends(text, layer, kind) else None
        for layer, kind in zip(layers, kinds, strict=True)
    ]
    return Located(
        outer=model,
        base=base,
        text=text,
        layers=layers,
        attentions=attentions,
        vision=vision,
        visual_ids=tuple(dict.fromkeys(visual_ids)),
        reads=_reads(attentions),
        windows=windows,
        cost=DecoderCost.from_config(text.config, dtype_bytes=_element_size(text)),
    )


def warn_if_untested(located: Located) -> None:
    """Say so, to the caller of `Attachment.attach`'s caller, if no test covers the model's family."""
    model_type = located.base.config.model_type
    if model_type not in MODEL_TYPES:
        warnings.warn(
            f"{model_type!r} is not among the families autoprune is tested with (see `autoprune "
            "families`). Its layers follow the conventions, so it is pruned; compare it first with a "
            "model that masks the dropped tokens, as docs/families.md shows",
            UserWarning,
            stacklevel=4,
        )


def _stacks(text: Model) -> list[nn.ModuleList]:
    depth = getattr(text.config, "num_hidden_layers", None)
    return [m for m in text.children() if isinstance(m, nn.ModuleList) and len(m) == depth]


def _layers(text: Model) -> list[nn.Module]:
    depth = getattr(text.config, "num_hidden_layers", None)
    stacks = _stacks(text)
    if not stacks:
        raise UnsupportedError(
            f"{type(text).__name__} does not hold the list of its {depth} layers itself, by which a decoder is "
            f"known; {NOT_SUPPORTED}"
        )
    if len(stacks) > 1:
        raise UnsupportedError(
            f"{type(text).__name__} has {len(stacks)} lists of {depth} layers where one was expected; "
            f"{NOT_SUPPORTED}"
        )
    layers = list(stacks[0])
    for layer in {type(layer): layer for layer in layers}.values():
        _check_arguments(layer)
    return layers


def _windows(text: Model, depth: int) -> list[Window | None]:
    sizes = {
        "sliding_attention": getattr(text.config, "sliding_window", None),
        "chunked_attention": getattr(text.config, "attention_chunk_size", None),
    }
    kinds = getattr(text.config, "layer_types", None) or ["sliding_attention"] * depth
    if unknown := sorted(set(kinds) - {*LAYER_TYPES, *RECURRENT_TYPES}):
        _refuse_kinds(text, unknown)
    windows = {
        kind: None if size is None else Window(size, kind == "chunked_attention")
        for kind, size in sizes.items()
    }
    return [windows.get(kind) for kind in kinds]


def _reads(attentions: list[nn.Module | None]) -> list[int | None]:
    """The layer that each reads keys and values from: the last one before it that keeps those of its kind."""
    reads: list[int | None] = []
    kept: dict[Any, int] = {}
    for index, attention in enumerate(attentions):
        kind = getattr(attention, "layer_type", None)
        shared = getattr(attention, "is_kv_shared_layer", False)
        if shared and kind not in kept:
            raise UnsupportedError(
                f"layer {index} of the decoder reads keys and values of an earlier layer ({kind}), which is "
                f"not found; {NOT_SUPPORTED}"
            )
        reads.append(kept[kind] if shared else None)
        if getattr(attention, "store_full_length_kv", False):
            kept[kind] = index
    return reads


def _refuse_kinds(text: Model, kinds: list[str]) -> NoReturn:
    raise UnsupportedError(
        f"{type(text).__name__} has layers of type {', '.join(kinds)}, but only the masks of "
        f"{', '.join(LAYER_TYPES[:-1])} and {LAYER_TYPES[-1]} are known; {NOT_SUPPORTED}"
    )


def _attends(text: Model, layer: nn.Module, kind: str | None) -> bool:
    """Whether a layer attends or passes a state on; one that does both is not known."""
    if kind not in RECURRENT_TYPES:
        return True
    if any(getattr(module, "is_causal", False) for module in layer.modules()):
        _refuse_kinds(text, [kind])
    return False


def _check_arguments(layer: nn.Module) -> None:
    if isinstance(layer, OptimizedModule):
        refuse_compiled("decoder layers")
    if hasattr(layer, "altup"):
        raise UnsupportedError(
            f"{type(layer).__name__} keeps several states of every token (AltUp), and cuts are made of one; "
            f"{NOT_SUPPORTED}"
        )
    parameters = inspect.signature(layer.forward).parameters.values()
    taken = {parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD}
    unknown = sorted(taken - LAYER_ARGUMENTS)
    missing = [] if "attention_mask" in taken else ["attention_mask"]
    if taken.isdisjoint(cache_argument.NAMES):
        missing.append("a cache")
    if unknown or missing:
        differs = f"takes {', '.join(unknown)}" if unknown else f"lacks {', '.join(missing)}"
        raise UnsupportedError(
            f"{type(layer).__name__} {differs}, unlike the decoder layers that can be cut; {NOT_SUPPORTED}"
        )


def refuse_compiled(part: str) -> None:
    """Raise UnsupportedError: a part of the model cannot be seen, as torch.compile was applied to it."""
    raise UnsupportedError(
        f"a part of the model was compiled by itself ({part}), and pruning cannot look into it; leave "
        "it uncompiled, and compile decoding as a whole (docs/api.md, handle.static_cache)"
    )


def _attention(layer: nn.Module) -> nn.Module:
    for module in layer.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "is_causal"):
            return module
    raise UnsupportedError(f"{type(layer).__name__} has no causal self-attention; {NOT_SUPPORTED}")


def named(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """What a layer is called with, all but the hidden states by name."""
    if len(args) == 1:
        return args, kwargs
    return args[:1], {**kwargs, **dict(zip(names_of(layer)[1:], args[1:], strict=False))}


def names_of(layer: nn.Module) -> tuple[str, ...]:
    """The arguments of a layer."""
    kind: Any = type(layer)
    return _names_of(kind)


@functools.cache
def _names_of(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _element_size(text: nn.Module) -> int:
    dtype = getattr(text, "dtype", None) or torch.get_default_dtype()
    return dtype.itemsize
