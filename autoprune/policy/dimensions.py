"""The dimensions of a decoder, read from its configuration, and what sets the layers of some decoders apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Latent:
    """Attention whose keys and values are made of one latent for all heads (MLA), which the cache holds.

    Attributes:
        rank: width of the latent.
        query_rank: that of the queries' own; 0 if they are made of hidden states at once.
        rotated, unrotated: dimensions of a head's query and key with and without rotary position; what is
            rotated of a key is one for all heads, and cached beside the latent.
        value: dimensions of a head's value.
        indexed: further cached numbers per token, by which sparse attention chooses keys.
    """

    rank: int
    query_rank: int
    rotated: int
    unrotated: int
    value: int
    indexed: int = 0

    @classmethod
    def from_config(cls, text: Any) -> Latent | None:
        """Of a text config; None if its attention has no latent."""
        if not read(text, "kv_lora_rank", default=0):
            return None
        return cls(
            rank=read(text, "kv_lora_rank"),
            query_rank=read(text, "q_lora_rank", default=0),
            rotated=read(text, "qk_rope_head_dim"),
            unrotated=read(text, "qk_nope_head_dim"),
            value=read(text, "v_head_dim"),
            indexed=read(text, "index_head_dim", default=0),
        )

    def weights(self, hidden: int, heads: int) -> int:
        """Of the projections of one layer."""
        query = heads * (self.rotated + self.unrotated)
        queries = self.query_rank * (hidden + query) if self.query_rank else hidden * query
        latents = hidden * (self.rank + self.rotated)
        return queries + latents + self.expansion(heads) + heads * self.value * hidden

    def expansion(self, heads: int) -> int:
        """Weights that make keys and values of a latent."""
        return self.rank * heads * (self.unrotated + self.value)


RECURRENT_TYPES = ("linear_attention", "conv")
"""Types of layers that pass a state of fixed size on instead of attending."""


@dataclass(frozen=True)
class Recurrent:
    """Layers that pass a state on from token to token: linear attention and short convolutions.

    Attributes:
        layers: whether each layer is one.
        products: multiply-adds per token of such a layer, beside the MLP.
        gate: weights of the gate in the attention of the other layers.
    """

    layers: tuple[bool, ...]
    products: int
    gate: int = 0

    @classmethod
    def from_config(cls, text: Any, hidden: int) -> Recurrent | None:
        """Of a text config; None if all of its layers attend. The state's own products are counted as in
        decoding, one token after another.
        """
        kinds = tuple(getattr(text, "layer_types", None) or ())
        if not set(kinds) & set(RECURRENT_TYPES):
            return None
        layers = tuple(kind in RECURRENT_TYPES for kind in kinds)
        if "conv" in kinds:
            return cls(layers, hidden * (4 * hidden + read(text, "conv_L_cache")))
        heads = read(text, "linear_num_value_heads")
        key, value = read(text, "linear_key_head_dim"), read(text, "linear_value_head_dim")
        keys, values = read(text, "linear_num_key_heads") * key, heads * value
        projections = hidden * (2 * keys + 3 * values + 2 * heads)
        convolution = (2 * keys + values) * read(text, "linear_conv_kernel_dim")
        # What a key finds in the state, what is written there instead, and what a query reads.
        state = 3 * heads * key * value
        gate = hidden * read(text, "num_attention_heads") * read(text, "head_dim")
        return cls(layers, projections + convolution + state, gate)


@dataclass(frozen=True)
class OwnLayer:
    """One layer of a decoder whose layers differ in their dimensions (Gemma 4).

    Attributes:
        head_dim, kv_heads, intermediate: as of `DecoderCost`.
        projections: how many of keys and values it projects: 2, or 1 where both are one. 0 where it reads those
            of an earlier layer; it caches none then.
        inputs: width of the layer's own input for every token; 0 without one.
    """

    head_dim: int
    kv_heads: int
    intermediate: int
    projections: int = 2
    inputs: int = 0

    @classmethod
    def all_from_config(cls, text: Any) -> tuple[OwnLayer, ...] | None:
        """Of a text config, one for each layer; None if it describes all layers alike."""
        sharing = read(text, "num_kv_shared_layers", default=0)
        inputs = read(text, "hidden_size_per_layer_input", default=0)
        kinds = tuple(getattr(text, "layer_types", None) or ())
        own = getattr(text, "is_heterogeneous", False)
        if not (sharing or inputs or own) or not kinds:
            return None
        experts = 0
        if getattr(text, "enable_moe_block", False):
            experts = read(text, "top_k_experts") * read(text, "moe_intermediate_size")
        layers, by_layer = [], getattr(text, "per_layer_config", None)
        for index, kind in enumerate(kinds):
            layer = text if by_layer is None else by_layer[index]
            reads = index >= len(kinds) - sharing
            wide = 2 if reads and getattr(text, "use_double_wide_mlp", False) else 1
            alike = getattr(text, "attention_k_eq_v", False) and kind == "full_attention"
            layers.append(
                cls(
                    head_dim=read(layer, "head_dim"),
                    kv_heads=read(layer, "num_key_value_heads"),
                    intermediate=wide * read(layer, "intermediate_size") + experts,
                    projections=0 if reads else 1 if alike else 2,
                    inputs=inputs,
                )
            )
        return tuple(layers)

    def linear_flops(self, hidden: int, heads: int) -> int:
        """FLOPs per token of projections, MLP, and what is made of the layer's own input."""
        attention = hidden * self.head_dim * (2 * heads + self.projections * self.kv_heads)
        return 2 * (attention + 3 * hidden * self.intermediate + 2 * hidden * self.inputs)

    @property
    def kv_size(self) -> int:
        """Numbers that one token has in its cache."""
        return 2 * self.kv_heads * self.head_dim if self.projections else 0


def text_config_of(config: Any) -> Any:
    """The decoder's own config of a composite model, or the config itself."""
    if hasattr(config, "get_text_config"):
        try:
            return config.get_text_config(decoder=True)
        except TypeError:  # the argument is younger than the method
            return config.get_text_config()
    return getattr(config, "text_config", None) or config


def read(config: Any, *names: str, default: int | None = None) -> int:
    """The first of these attributes that is set; a ValueError names them when none is and there is
    no default.
    """
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)):
            raise ValueError(
                f"{type(config).__name__}.{name} is {value!r}, where one number for all layers was expected; "
                "build DecoderCost from its dimensions"
            )
        if value is not None:
            return int(value)
    if default is None:
        raise ValueError(
            f"{type(config).__name__} has no {' or '.join(names)}; pass the decoder's text config, "
            "or build DecoderCost from its dimensions"
        )
    return default


def active_intermediate(config: Any, hidden: int) -> int:
    """MLP width one token passes through: of all its active experts in a mixture of experts. The router is
    not counted, and layers that have no experts count as the others.
    """
    dense = read(
        config, "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", default=4 * hidden
    )
    if getattr(config, "block_auto_adjust_ff_dim", False):
        # LFM2 rounds two thirds of it up to blocks.
        block = read(config, "block_multiple_of")
        dense = int(config.block_ffn_dim_multiplier * int(2 * dense / 3))
        dense = -(-dense // block) * block
    experts = read(config, "num_experts_per_tok", "moe_k", default=0)
    if not experts:
        return dense
    width = read(config, "moe_intermediate_size", default=dense)
    # Llama 4 always has one that is shared.
    of_llama = int(getattr(config, "interleave_moe_layer_step", None) is not None)
    shared = read(config, "n_shared_experts", "moe_num_shared_experts", default=of_llama) * width
    names = ("shared_expert_intermediate_size", "shared_intermediate_size")
    return experts * width + read(config, *names, default=shared)
