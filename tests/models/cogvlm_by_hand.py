"""CogVLM computed token by token in plain loops, from tensors under their published names.

Nothing of the package is used: neither its masks, nor its positions, nor its order of the experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TEXT, VISUAL = 0, 1


@dataclass
class Sizes:
    """heads, layers: of the decoder; tower_heads, tower_layers: of the tower."""

    heads: int
    layers: int
    tower_heads: int
    tower_layers: int
    patch: int
    eps: float = 1e-6


def expert_of(types: Sequence[int], place: int) -> str:
    """A token is for the vision expert if it and its successor are visual."""
    last = place + 1 == len(types)
    if types[place] == VISUAL and not last and types[place + 1] == VISUAL:
        return "vision"
    return "language"


def positions_of(types: Sequence[int]) -> list[int]:
    """Every token has the next position, but the inner visual tokens of a picture have one together."""
    found: list[int] = []
    for place, kind in enumerate(types):
        first = place == 0 or types[place - 1] == TEXT
        last = place + 1 == len(types) or types[place + 1] == TEXT
        inner = kind == VISUAL and not first and not last
        second = inner and (place == 1 or types[place - 2] == TEXT)
        step = 0 if inner and not second else 1
        found.append(found[-1] + step if found else 0)
    return found


class ByHand:
    """The whole model, for one prompt at a time.

    Args:
        tensors: of the published checkpoint, by name.
    """

    def __init__(self, tensors: dict[str, Tensor], sizes: Sizes):
        self.tensors, self.sizes = tensors, sizes

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def logits(self, prompt: Sequence[int | str], pixels: Tensor | None = None) -> Tensor:
        """[length, vocabulary].

        Args:
            prompt: ids of words, and "picture" where boi, the patches and eoi go.
            pixels: [3, height, width].
        """
        rows: list[Tensor] = []
        types: list[int] = []
        for token in prompt:
            if token == "picture":
                shown = [self["model.vision.boi"][0, 0], *self.picture(pixels)]
                shown.append(self["model.vision.eoi"][0, 0])
                rows += shown
                types += [VISUAL] * len(shown)
            else:
                rows.append(self["model.embed_tokens.weight"][token])
                types.append(TEXT)
        for layer in range(self.sizes.layers):
            rows = self.layer(f"model.layers.{layer}.", rows, types)
        return torch.stack([self["lm_head.weight"] @ self.rms(row, "model.norm") for row in rows])

    def layer(self, name: str, rows: list[Tensor], types: Sequence[int]) -> list[Tensor]:
        experts = [expert_of(types, place) for place in range(len(types))]
        positions = positions_of(types)
        queries, keys, values = [], [], []
        for row, expert, position in zip(rows, experts, positions, strict=True):
            normal = self.rms(row, name + "input_layernorm")
            fused = self[f"{name}self_attn.{expert}_expert_query_key_value.weight"] @ normal
            query, key, value = fused.chunk(3)
            queries.append(self.rotate(query, position))
            keys.append(self.rotate(key, position))
            values.append(value.view(self.sizes.heads, -1))
        after = []
        for place, (row, expert) in enumerate(zip(rows, experts, strict=True)):
            seen = torch.stack(keys[: place + 1], dim=1), torch.stack(values[: place + 1], dim=1)
            mixed = attend(queries[place], *seen)
            row = row + self[f"{name}self_attn.{expert}_expert_dense.weight"] @ mixed
            mlp = f"{name}mlp.{expert}_mlp."
            normal = self.rms(row, name + "post_attention_layernorm")
            gate = F.silu(self[mlp + "gate_proj.weight"] @ normal)
            inner = gate * (self[mlp + "up_proj.weight"] @ normal)
            after.append(row + self[mlp + "down_proj.weight"] @ inner)
        return after

    def rms(self, row: Tensor, name: str) -> Tensor:
        return self[name + ".weight"] * row / torch.sqrt((row * row).mean() + self.sizes.eps)

    def rotate(self, row: Tensor, position: int) -> Tensor:
        """[heads, size]: the pair (i, i + size / 2) of each head turns by position * 10000^(-2i / size)."""
        heads = row.view(self.sizes.heads, -1).clone()
        size = heads.shape[1]
        for index in range(size // 2):
            angle = position * 10000 ** (-2 * index / size)
            one, other = heads[:, index].clone(), heads[:, index + size // 2].clone()
            heads[:, index] = one * math.cos(angle) - other * math.sin(angle)
            heads[:, index + size // 2] = other * math.cos(angle) + one * math.sin(angle)
        return heads

    def picture(self, pixels: Any) -> list[Tensor]:
        """Each patch as the decoder sees it."""
        name = "model.vision.patch_embedding."
        rows = [self[name + "cls_embedding"][0]]
        size = self.sizes.patch
        for top in range(0, pixels.shape[1], size):
            for left in range(0, pixels.shape[2], size):
                square = pixels[:, top : top + size, left : left + size].flatten()
                weight = self[name + "proj.weight"].flatten(1)
                rows.append(weight @ square + self[name + "proj.bias"])
        places = self[name + "position_embedding.weight"]
        rows = [row + place for row, place in zip(rows, places, strict=True)]
        for block in range(self.sizes.tower_layers):
            rows = self.block(f"model.vision.transformer.layers.{block}.", rows)
        return [self.project(row) for row in rows[1:]]

    def block(self, name: str, rows: list[Tensor]) -> list[Tensor]:
        fused = [self.linear(row, name + "attention.query_key_value") for row in rows]
        query, key, value = (
            torch.stack([row.chunk(3)[part].view(self.sizes.tower_heads, -1) for row in fused])
            for part in range(3)
        )
        after = []
        for place, row in enumerate(rows):
            mixed = attend(query[place], key.transpose(0, 1), value.transpose(0, 1))
            mixed = self.linear(mixed, name + "attention.dense")
            row = row + self.norm(mixed, name + "input_layernorm", 1e-6)
            inner = F.gelu(self.linear(row, name + "mlp.fc1"))
            inner = self.linear(inner, name + "mlp.fc2")
            after.append(row + self.norm(inner, name + "post_attention_layernorm", 1e-6))
        return after

    def project(self, row: Tensor) -> Tensor:
        name = "model.vision.linear_proj."
        row = self[name + "linear_proj.weight"] @ row
        row = F.gelu(self.norm(row, name + "norm1", 1e-5))
        gate = F.silu(self[name + "gate_proj.weight"] @ row)
        inner = gate * (self[name + "dense_h_to_4h.weight"] @ row)
        return self[name + "dense_4h_to_h.weight"] @ inner

    def linear(self, row: Tensor, name: str) -> Tensor:
        return self[name + ".weight"] @ row + self[name + ".bias"]

    def norm(self, row: Tensor, name: str, eps: float) -> Tensor:
        centred = row - row.mean()
        normal = centred / torch.sqrt((centred * centred).mean() + eps)
        return normal * self[name + ".weight"] + self[name + ".bias"]


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Of one token, all heads behind each other.

    Args:
        query: [heads, size].
        keys, values: [heads, tokens, size].
    """
    heads = []
    for one, key, value in zip(query, keys, values, strict=True):
        weights = torch.softmax(key @ one / math.sqrt(one.shape[0]), dim=0)
        heads.append(weights @ value)
    return torch.cat(heads)
