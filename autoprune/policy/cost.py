"""FLOPs, KV-cache bytes and peak memory of a decoder as a function of the visual tokens that enter each layer.

Conventions: a multiply-add counts as 2 FLOPs. Causal attention is counted as the full n x n
product, as FLOP counters and profilers do. Norms, activations, rotary embeddings, softmax,
embedding look-up and the pruning itself are not counted (together well below one per cent for
ordinary questions). A look at the attention of t text rows is 2 heads head_dim t n FLOPs, so before each
cut at most 64 / n of that layer's attention, as t is at most 128. Weight tying shares the lm_head's
storage and leaves its FLOPs unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .dimensions import Latent, OwnLayer, Recurrent, active_intermediate, read, text_config_of

PLAIN_MLP_MODEL_TYPES = frozenset(
    {
        "apertus", "arcee", "bloom", "codegen", "falcon", "fuyu", "git", "gpt2", "gpt_bigcode",
        "gpt_neo", "gpt_neox", "gptj", "jais2", "mpt", "nanochat", "nemotron", "opt", "persimmon",
        "phi", "starcoder2",
    }
)  # fmt: skip
"""Text model types with a two-matrix MLP; every other type is taken as gated (gate, up and down
projection).
"""

FUSED_MLP_MODEL_TYPES = frozenset(
    {"glm", "glm4", "glm4v_text", "glm_image_text", "glm_ocr_text", "phi3"}
)
"""Text model types whose gated MLP computes gate and up projection in one piece."""


@dataclass(frozen=True)
class DecoderCost:
    """Dimensions of a decoder that decide its FLOPs and KV bytes.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim: of the decoder's attention; kv_heads < heads is
            GQA.
        intermediate: MLP width that one token passes through (for mixtures of experts, of its
            active experts).
        gated_mlp: True for gate/up/down (SwiGLU and relatives), False for up/down.
        fused_mlp: whether a gated MLP computes gate and up in one piece; matters for memory alone.
        latent: of attention whose cache holds latents, None where it holds keys and values; head_dim is what
            is rotated then, and kv_heads does not matter.
        recurrent: the layers that do not attend; None where all do.
        own: the layers one by one where they differ, with a gated MLP each. What is said of all layers is said
            of the widest then.
        vocab_size: rows of the lm_head.
        dtype_bytes: bytes per element of the cache and of hidden states (2 for float16 and
            bfloat16).
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    gated_mlp: bool = True
    vocab_size: int = 0
    dtype_bytes: int = 2
    fused_mlp: bool = False
    latent: Latent | None = None
    recurrent: Recurrent | None = None
    own: tuple[OwnLayer, ...] | None = None

    def __post_init__(self) -> None:
        for name in (
            "layers",
            "hidden",
            "heads",
            "kv_heads",
            "head_dim",
            "intermediate",
            "dtype_bytes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")

    @classmethod
    def from_config(cls, config: Any, dtype_bytes: int = 2) -> DecoderCost:
        """Reads a decoder's dimensions from a transformers-like config, by attribute names only.

        Args:
            config: a text config, or a composite config that holds one (`get_text_config()` or
                `text_config`).
            dtype_bytes: bytes per element of the cache and of hidden states.

        Raises:
            ValueError: an attribute that decides the cost is missing, or is a list; the message names it.
        """
        text = text_config_of(config)
        hidden = read(text, "hidden_size", "n_embd", "d_model")
        heads = read(text, "num_attention_heads", "n_head")
        if (own := OwnLayer.all_from_config(text)) is not None:
            return cls(
                layers=len(own),
                hidden=hidden,
                heads=heads,
                kv_heads=max(layer.kv_heads for layer in own),
                head_dim=max(layer.head_dim for layer in own),
                intermediate=max(layer.intermediate for layer in own),
                vocab_size=read(text, "vocab_size", default=0),
                dtype_bytes=dtype_bytes,
                own=own,
            )
        return cls(
            layers=read(text, "num_hidden_layers", "n_layer"),
            hidden=hidden,
            heads=heads,
            kv_heads=read(text, "num_key_value_heads", default=heads),
            head_dim=read(text, "head_dim", default=hidden // heads),
            intermediate=active_intermediate(text, hidden),
            gated_mlp=getattr(text, "model_type", None) not in PLAIN_MLP_MODEL_TYPES,
            fused_mlp=getattr(text, "model_type", None) in FUSED_MLP_MODEL_TYPES,
            vocab_size=read(text, "vocab_size", default=0),
            dtype_bytes=dtype_bytes,
            latent=Latent.from_config(text),
            recurrent=Recurrent.from_config(text, hidden),
        )

    @property
    def differs(self) -> str | None:
        """What sets some layers apart from others, in words; None where all cost the same."""
        if self.recurrent is not None:
            return f"{sum(self.recurrent.layers)} of these {self.layers} do not attend"
        if self.own is not None and len(set(self.own)) > 1:
            return f"these {self.layers} are of {len(set(self.own))} kinds"
        return None

    @property
    def linear_flops(self) -> int:
        """FLOPs per token and layer of the projections and the MLP, in a layer that attends."""
        if self.latent is None:
            attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        else:
            attention = self.latent.weights(self.hidden, self.heads)
        gate = 0 if self.recurrent is None else self.recurrent.gate
        return 2 * (attention + gate) + self.mlp_flops

    @property
    def mlp_flops(self) -> int:
        """FLOPs per token and layer of the MLP."""
        return 2 * (3 if self.gated_mlp else 2) * self.hidden * self.intermediate

    @property
    def attention_flops(self) -> int:
        """FLOPs per query-key pair and layer: the scores and the weighted sum of values."""
        if (latent := self.latent) is not None:
            return 2 * self.heads * (latent.rotated + latent.unrotated + latent.value)
        return 4 * self.heads * self.head_dim

    @property
    def lm_head_flops(self) -> int:
        """FLOPs of the logits of one position."""
        return 2 * self.hidden * self.vocab_size

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token occupies in one layer's cache; where layers differ, in that of the widest."""
        if (latent := self.latent) is not None:
            return (latent.rank + latent.rotated + latent.indexed) * self.dtype_bytes
        return 2 * self.kv_heads * self.head_dim * self.dtype_bytes

    def layer_flops(self, tokens: ArrayLike) -> Any:
        """FLOPs of one layer's prefill over `tokens` positions, text included, if it attends; same shape,
        exact integers.
        """
        n = np.asarray(tokens, dtype=np.int64)
        longest = int(n.max(initial=0))
        if self.layers * longest * (self.linear_flops + self.attention_flops * longest) >= 2**62:
            raise ValueError(
                f"the FLOPs of a prompt of {longest} tokens are beyond what is counted exactly; give a smaller "
                "prompt, or a budget of tokens or a ratio"
            )
        flops = self.linear_flops * n + self.attention_flops * n * n
        return int(flops) if flops.ndim == 0 else flops

    def prefill_flops(
        self, visual_per_layer: ArrayLike, num_text: ArrayLike = 0, lm_head: bool = False
    ) -> Any:
        """Decoder prefill FLOPs of a prompt, text included.

        Args:
            visual_per_layer: visual tokens entering each layer, `[L]` or `[batch, L]`.
            num_text: other tokens of the prompt (before and after the image), scalar or `[batch]`.
            lm_head: adds the logits of one position. Off by default, as in `Budget.flops`.

        Returns:
            int for `[L]`, int64 `[batch]` for `[batch, L]`.

        Raises:
            ValueError: `visual_per_layer` does not have one entry per layer.
        """
        tokens = self._tokens(visual_per_layer, num_text)
        flops = self._by_kind(np.asarray(self.layer_flops(tokens)), tokens, tokens * tokens)
        return int_or_rows(flops.sum(axis=-1) + (self.lm_head_flops if lm_head else 0))

    def look_flops(
        self, keys: ArrayLike, queries: ArrayLike, values: ArrayLike, rows: ArrayLike
    ) -> Any:
        """FLOPs of looking at a layer's attention ahead of the layer: projections, and scores of a few rows.

        Args:
            keys, queries, values: of how many tokens each is projected. Latents are made of the keys' tokens.
            rows: rows whose scores are computed, over all these keys. Each is a scalar or `[batch]`.
        """
        keys, queries, values, rows = (
            np.asarray(numbers, dtype=np.int64) for numbers in (keys, queries, values, rows)
        )
        if (latent := self.latent) is not None:
            # All but what makes the output.
            weights = latent.weights(self.hidden, self.heads)
            projected = (weights - self.heads * latent.value * self.hidden) * keys
            size = latent.rotated + latent.unrotated
        else:
            size = self.head_dim
            projected = (
                self.hidden * size * (self.heads * queries + self.kv_heads * (keys + values))
            )
        return int_or_rows(2 * (projected + self.heads * size * rows * keys))

    def look_bytes(self, columns: int, looked: int, first: bool) -> int:
        """Most bytes of a look ahead of a layer, beside cache and rotary embeddings.

        Those are normed hidden states, queries, keys and values. While the queries are rotated, there are four
        tensors of their size; while the rows attend, one.

        Args:
            columns: tokens that it computes, of all prompts together.
            looked: bytes that the look takes while the rows attend, for all of them.
            first: whether the hidden states that enter are what enters the decoder, which is not counted.
        """
        size = self.head_dim
        if (latent := self.latent) is not None:
            size = latent.rotated + latent.unrotated
        states = self.hidden * (1 if first else 2)
        row = (states + size * (self.heads + 2 * self.kv_heads)) * self.dtype_bytes
        rotating = 3 * size * self.heads * self.dtype_bytes * columns
        return row * columns + max(rotating, looked)

    def decode_flops(
        self, visual_per_layer: ArrayLike, num_text: ArrayLike = 0, lm_head: bool = False
    ) -> Any:
        """FLOPs of one generated token that attends to the cached tokens and to itself; arguments
        as above.

        `num_text` counts every cached position that is not visual, tokens generated so far
        included.
        """
        keys = self._tokens(visual_per_layer, num_text) + 1
        per_key = self.attention_flops
        flops = self.linear_flops
        if self.latent is not None:
            # transformers makes the keys and values of all cached latents anew at each step.
            made = 2 * self.latent.expansion(self.heads)
            per_key, flops = per_key + made, flops - made
        by_layer = self._by_kind(flops + per_key * keys, np.ones_like(keys), keys)
        return int_or_rows(by_layer.sum(axis=-1) + (self.lm_head_flops if lm_head else 0))

    def kv_bytes(self, visual_per_layer: ArrayLike, num_text: ArrayLike = 0) -> Any:
        """Bytes of keys and values (or of latents) after prefill, text included; arguments as above. The state
        of a layer that does not attend has a fixed size and is not counted.
        """
        held = self._held_bytes(self._tokens(visual_per_layer, num_text))
        return int_or_rows(held.sum(axis=-1))

    def peak_bytes(
        self,
        visual_per_layer: ArrayLike,
        num_text: ArrayLike = 0,
        num_visual: ArrayLike | None = None,
        observed: ArrayLike = 0,
        sharing: int = 1,
        cached: ArrayLike | None = None,
        looked: ArrayLike = 0,
        ahead: ArrayLike = 0,
    ) -> Any:
        """Most bytes that the prefill of a prompt allocates and holds at one time.

        That is in the MLP of some layer: the cache up to there, rotary embeddings, the hidden states
        that enter the layer, its residual and normed ones, and the MLP's products (three for a gated
        one, as transformers' Llama and Qwen compute it, four for a fused one, else two). Or it is where
        a method looks at the attention of some layer, with its queries in the place of the MLP's
        products. Attention that forms whole score matrices ("eager") needs more; weights and what enters the
        decoder are not counted.

        Args:
            visual_per_layer, num_text: as above.
            num_visual: visual tokens entering the decoder, which a cut before layer 0 reduces; scalar or
                `[batch]`. Default: those entering layer 0.
            observed: bytes of each layer's attention that a method keeps to decide the next cut, and what
                else is held while a layer runs, like `visual_per_layer` or a scalar.
            sharing: prompts of the batch that have the rotary embeddings of the whole prompt in common.
            cached: columns of each layer's cache, `[L]`, where a batch pads them. Default: the tokens that
                enter the layer.
            looked: bytes that it takes to look at each layer's attention, while that attends; like
                `observed`.
            ahead: bytes that a look ahead of each layer takes beside the cache, see `look_bytes`; likewise.

        Returns:
            int for `[L]`, int64 `[batch]` for `[batch, L]`.
        """
        tokens = self._tokens(visual_per_layer, num_text)
        first = tokens[..., :1]
        if num_visual is not None:
            entering = np.asarray(num_visual, dtype=np.int64) + np.asarray(num_text, dtype=np.int64)
            first = np.broadcast_to(entering[..., None], first.shape)
        before = np.concatenate([first, tokens[..., :-1]], axis=-1)
        was_cut = tokens < first
        # What enters layer 0 uncut was there before.
        inputs = np.where((np.arange(self.layers) > 0) | was_cut, tokens, 0)
        inputs[..., 1:] += np.where(tokens < before, before, 0)[..., 1:]
        states = self.hidden * (2 * tokens + inputs)
        # One piece stays whole while the product of its halves is taken.
        pieces = 3 + self.fused_mlp if self.gated_mlp else 2
        products = pieces * self.intermediate * tokens
        # Behind a cut, those of the whole prompt once more, in one piece to be taken from.
        copies = np.where(was_cut, 2, 1)
        rotary = 2 * self.head_dim * (copies * (first // sharing) + np.where(was_cut, tokens, 0))
        working = (states + products + rotary) * self.dtype_bytes
        working = working + np.asarray(observed, dtype=np.int64)
        looks = np.asarray(looked, dtype=np.int64)
        attending = (states + self.heads * self.head_dim * tokens + rotary) * self.dtype_bytes
        working = np.where(looks > 0, np.maximum(working, attending + looks), working)
        held = self._held_bytes(tokens if cached is None else np.asarray(cached, dtype=np.int64))
        cache = held.cumsum(axis=-1)
        rotated = 2 * self.head_dim * (first // sharing) * self.dtype_bytes
        looks = np.asarray(ahead, dtype=np.int64)
        look = np.where(looks > 0, cache - held + rotated + looks, 0)
        return int_or_rows(np.maximum(cache + working, look).max(axis=-1))

    def _by_kind(
        self, alike: NDArray[np.int64], tokens: NDArray[np.int64], pairs: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """FLOPs of each layer, of what they are in layers that are all alike and attend.

        Args:
            tokens: that run through each layer; pairs: of a query and a key that it attends over.
        """
        if self.own is not None:
            linear = [layer.linear_flops(self.hidden, self.heads) for layer in self.own]
            pair = [4 * self.heads * layer.head_dim for layer in self.own]
            by_token, by_pair = np.array(linear, np.int64), np.array(pair, np.int64)
            return by_token * tokens + by_pair * pairs
        if self.recurrent is None:
            return alike
        passed_on = (2 * self.recurrent.products + self.mlp_flops) * tokens
        return np.where(self.recurrent.layers, passed_on, alike)

    def _held_bytes(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bytes that each layer's cache holds."""
        if self.own is not None:
            sizes = [layer.kv_size * self.dtype_bytes for layer in self.own]
            return tokens * np.array(sizes, np.int64)
        held = tokens if self.recurrent is None else np.where(self.recurrent.layers, 0, tokens)
        return held * self.kv_bytes_per_token

    def _tokens(self, visual_per_layer: ArrayLike, num_text: ArrayLike) -> NDArray[np.int64]:
        visual = np.asarray(visual_per_layer, dtype=np.int64)
        if visual.ndim not in (1, 2) or visual.shape[-1] != self.layers:
            raise ValueError(
                f"visual_per_layer must be [{self.layers}] or [batch, {self.layers}], "
                f"one count per layer, got shape {list(visual.shape)}"
            )
        return visual + np.asarray(num_text, dtype=np.int64)[..., None]


def released_prefill_macs(tokens_per_layer: ArrayLike, hidden: int, intermediate: int) -> Any:
    """The released AutoPrune code's prefill counter: `sum_l 4 n d^2 + 2 n^2 d + 3 n d m`, in
    multiply-accumulates.

    It equals half of `DecoderCost.prefill_flops` for multi-head attention with a gated MLP.

    Args:
        tokens_per_layer: tokens entering each layer, text included, `[L]` or `[batch, L]`.
        hidden: d.
        intermediate: m, the MLP width.
    """
    n = np.asarray(tokens_per_layer, dtype=np.int64)
    return int_or_rows(
        (4 * n * hidden**2 + 2 * n * n * hidden + 3 * n * hidden * intermediate).sum(axis=-1)
    )


def int_or_rows(values: Any) -> Any:
    """An int for one prompt, else the array with a number for each."""
    return int(values) if np.ndim(values) == 0 else values
