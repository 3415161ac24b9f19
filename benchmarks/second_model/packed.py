"""One picture with many questions behind it in one row, none of which sees another.

A row is the head (`<|im_start|>user` and a line break), the visual tokens, then the text: questions with
their answers, each at the positions it would have alone. So a row teaches many answers for one picture.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from model import LINEARS, VISUAL_TOKENS, Adapter
from numpy.typing import NDArray
from questions import Question
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

IGNORED = -100
HEAD = "<|im_start|>user\n"


class Packer:
    """Turns questions into a row of tokens of a fixed length."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self.length = length
        self.head = tokenizer.encode(HEAD, add_special_tokens=False)
        self.first_position = len(self.head) + VISUAL_TOKENS
        encode = lru_cache(maxsize=100_000)(
            lambda text: tokenizer.encode(text, add_special_tokens=False)
        )
        self._encode = encode

    def pair(self, question: Question) -> tuple[list[int], list[int]]:
        """Tokens of the question, up to where the answer begins, and of the answer with its end."""
        asked = f"\n{question.text}<|im_end|>\n<|im_start|>assistant\n"
        return self._encode(asked), self._encode(f"{question.answer}<|im_end|>")

    def pack(self, questions: Sequence[Question]) -> NDArray[np.int64]:
        """Tokens, segments, positions and targets, [4, length]; questions that do not fit are left out.

        Segments count from 1, and 0 is padding. A target is the token that follows, in answers only.
        """
        row = np.zeros((4, self.length), dtype=np.int64)
        row[3] = IGNORED
        start = 0
        for segment, question in enumerate(questions, 1):
            asked, answer = self.pair(question)
            end = start + len(asked) + len(answer)
            if end > self.length:
                break
            row[0, start:end] = asked + answer
            row[1, start:end] = segment
            row[2, start:end] = self.first_position + np.arange(end - start)
            row[3, start + len(asked) - 1 : end - 1] = answer
            start = end
        return row


def answer_places(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where targets stand in packed rows [pictures, 4, length], as indices into pictures x length.

    Worked out before rows are sent to a device: a device would have to be waited for.
    """
    return np.flatnonzero(rows[:, 3] != IGNORED)


def choose(ask, kinds: Sequence[str], weights: Sequence[float], rng: random.Random, tries: int):
    """Different questions of random kinds, the kinds by their weights."""
    found: dict[str, Question] = {}
    for kind in rng.choices(kinds, weights, k=tries):
        question = ask(kind)
        if question:
            found.setdefault(question.text, question)
    return list(found.values())


def features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Visual tokens [pictures, 144, hidden] of uint8 pictures [pictures, 96, 96, 3]."""
    states = tower_states(model.model.vision_tower, pixels)
    return model.model.multi_modal_projector(states)


def tower_states(tower: nn.Module, pixels: Tensor) -> Tensor:
    """The tower's last layer, as LLaVA takes it: before the last norm."""
    normalised = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    return tower(normalised, output_hidden_states=True).hidden_states[-1]


def answer_logits(
    model: LlavaForConditionalGeneration,
    adapter: Adapter,
    visual: Tensor,
    rows: Tensor,
    where: Tensor,
    head: Tensor,
    run_block=None,
) -> Tensor:
    """Logits [answers' tokens, vocabulary] of packed rows [pictures, 4, length].

    The same computation as the model's own forward, in `visual`'s type, with the adapter's sums as weights.

    Args:
        where: `answer_places(rows)`.
        head: tokens before the picture.
        run_block: a compiled `block`; default: `block` itself.
    """
    decoder, dtype = model.model.language_model, visual.dtype
    tokens, segments, positions, _ = rows.unbind(1)
    pictures, before = len(rows), len(head) + VISUAL_TOKENS
    embedding = decoder.embed_tokens.weight
    first = embedding[head].expand(pictures, -1, -1)
    text = F.embedding(tokens, embedding)
    x = torch.cat([first.to(dtype), visual, text.to(dtype)], dim=1)
    places = torch.arange(before, device=rows.device).expand(pictures, -1)
    cos, sin = (
        part.to(dtype)[:, None]
        for part in decoder.rotary_emb(x, torch.cat([places, positions], dim=1))
    )
    mask = _mask(segments, before).to(dtype)
    weights = {name: adapter.weight(name).to(dtype).unbind() for name in LINEARS}
    for index, layer in enumerate(decoder.layers):
        x = (run_block or block)(
            x,
            cos,
            sin,
            mask,
            layer.input_layernorm.weight.to(dtype),
            layer.post_attention_layernorm.weight.to(dtype),
            *(weights[name][index] for name in LINEARS),
        )
    last = x[:, before:].flatten(0, 1)[where]
    last = F.rms_norm(last, x.shape[-1:], decoder.norm.weight.to(dtype), eps=_EPSILON)
    return last @ embedding.to(dtype).T


_EPSILON = 1e-5


def block(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    norm1: Tensor,
    norm2: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
) -> Tensor:
    """One Llama layer on [rows, length, hidden]; weights are [out, in], the mask is added."""
    rows, length, width = x.shape
    size = cos.shape[-1]

    def heads(projected: Tensor) -> Tensor:
        return projected.view(rows, length, -1, size).transpose(1, 2)

    def rotated(part: Tensor) -> Tensor:
        one, two = part.chunk(2, dim=-1)
        return part * cos + torch.cat([-two, one], dim=-1) * sin

    y = F.rms_norm(x, (width,), norm1, eps=_EPSILON)
    query, key, value = rotated(heads(y @ q.T)), rotated(heads(y @ k.T)), heads(y @ v.T)
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    x = x + mixed.transpose(1, 2).reshape(rows, length, -1) @ o.T
    y = F.rms_norm(x, (width,), norm2, eps=_EPSILON)
    return x + (F.silu(y @ gate.T) * (y @ up.T)) @ down.T


def _mask(segments: Tensor, before: int) -> Tensor:
    """What is added to attention's logits, [rows, 1, length, length]: each question sees itself and the
    picture."""
    whole = F.pad(segments, (before, 0), value=-1)
    same = whole[:, :, None] == whole[:, None, :]
    seen = (same | (whole == -1)[:, None, :]).tril()
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -1e4)[:, None]
