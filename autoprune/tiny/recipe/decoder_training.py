"""Stage two: projector and decoder on the frozen vision tower, loss on the answers only."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from autoprune.tiny.recipe import vision_training
from autoprune.tiny.recipe.architecture import VISUAL_TOKENS
from autoprune.tiny.recipe.attention import PREFIXED, use_attention
from autoprune.tiny.recipe.lessons import KIND_WEIGHTS, Layout, Lesson, Teacher, reweigh
from autoprune.tiny.recipe.pool import Pool
from autoprune.tiny.recipe.training import Stage, processes, rank
from autoprune.tiny.recipe.vision_training import encode, to_pixels

# <s> and <|user|> stand before the picture.
PREFIX = VISUAL_TOKENS + 2


class DecoderTrainer(nn.Module):
    """LLaVA with a forward that shares one picture among many independent questions."""

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        layout: Layout,
        compiled: bool = True,
    ) -> None:
        super().__init__()
        self.llava = model
        self.layout = layout
        self.start = tokenizer.convert_tokens_to_ids(["<s>", "<|user|>"])
        model.model.vision_tower.requires_grad_(False)
        positions = [torch.arange(PREFIX)]
        for blocks, length in layout.blocks:
            positions += [torch.arange(PREFIX, PREFIX + length).repeat(blocks)]
        self.register_buffer("positions", torch.cat(positions)[None], persistent=False)
        self._run_vision, self._run_layer = vision_training.run_layer, _run_layer
        if compiled:
            self._run_vision = torch.compile(self._run_vision, dynamic=False)
            self._run_layer = torch.compile(self._run_layer, dynamic=False)

    def forward(self, pixels: Tensor, ids: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Logits of the text's tokens.

        Parameters
        ----------
        pixels : [batch, 3, 96, 96]
        ids : text after the picture, [batch, tokens], in the blocks of the layout
        chosen : bool [batch, tokens], the positions to give logits of: [chosen, words] instead
            of [batch, tokens, words]
        """
        model = self.llava.model
        with torch.no_grad():
            patches = encode(model.vision_tower, pixels, self._run_vision)[:, 1:]
        decoder = model.language_model
        start = torch.tensor(self.start, device=ids.device).expand(len(ids), -1)
        hidden = torch.cat(
            [
                decoder.embed_tokens(start),
                model.multi_modal_projector(patches),
                decoder.embed_tokens(ids),
            ],
            dim=1,
        )
        rotary = decoder.rotary_emb(hidden, position_ids=self.positions)
        layout = (PREFIX, self.layout.blocks)
        with use_attention(decoder, PREFIXED):
            for layer in decoder.layers:
                hidden = self._run_layer(layer, hidden, rotary, layout)
        text = hidden[:, PREFIX:]
        return self.llava.lm_head(decoder.norm(text if chosen is None else text[chosen]))


def _run_layer(
    layer: nn.Module,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    layout: tuple[int, tuple[tuple[int, int], ...]],
) -> Tensor:
    return layer(hidden, attention_mask=None, position_embeddings=rotary, layout=layout)


def answer_loss(logits: Tensor, lesson: Lesson) -> Tensor:
    """Weighted cross-entropy of the answers' tokens; `logits` [answer tokens, words]."""
    chosen = lesson.on_answers
    losses = F.cross_entropy(logits.float(), lesson.targets[chosen], reduction="none")
    weights = lesson.weights[chosen]
    return (losses * weights).sum() / weights.sum()


def right_answers(logits: Tensor, lesson: Lesson) -> dict[str, list[bool]]:
    """Per kind, whether each answer is predicted in full when its own tokens are fed back."""
    chosen = lesson.on_answers
    wrong = logits.argmax(-1) != lesson.targets[chosen]
    failed = set(lesson.answers[chosen][wrong].tolist())
    right: dict[str, list[bool]] = defaultdict(list)
    for index, kind in enumerate(lesson.kinds):
        right[kind].append(index not in failed)
    return right


def decoder_stage(
    trainer: DecoderTrainer,
    teacher: Teacher,
    train: Pool,
    heldout: Pool,
    device: str = "cpu",
    batch_size: int = 16,
    seed: int = 0,
    export: Callable[[dict[str, float]], None] = lambda metrics: None,
) -> Stage:
    """The stage that trains projector and decoder; `export` is given held-out accuracies."""

    def run(pool: Pool, index: np.ndarray, rng: random.Random, noise: np.random.Generator | None):
        scenes = [pool.objects[i] for i in index]
        lesson = teacher.lesson(scenes, rng, stage.state["weights"])
        for name in ("ids", "targets", "weights", "answers"):
            setattr(lesson, name, getattr(lesson, name).to(device))
        with torch.autocast(device, dtype=torch.bfloat16):
            pixels = to_pixels(pool.images[index], noise).to(device)
            logits = trainer(pixels, lesson.ids, lesson.on_answers)
        return logits, lesson

    def batch_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        noise = np.random.default_rng([seed, 2, step, rank()])
        index = np.sort(noise.integers(0, len(train), size=batch_size // processes()))
        logits, lesson = run(train, index, random.Random(f"{seed}-{step}-{rank()}"), noise)
        return answer_loss(logits, lesson), {}

    def evaluate() -> dict[str, float]:
        right: dict[str, list[bool]] = defaultdict(list)
        rng, size = random.Random(0), batch_size // processes()
        weights, stage.state["weights"] = stage.state["weights"], dict(KIND_WEIGHTS)
        for start in range(0, min(len(heldout), 320), size):
            index = np.arange(start, start + size)
            for kind, hits in right_answers(*run(heldout, index, rng, None)).items():
                right[kind] += hits
        stage.state["weights"] = weights
        return {kind: sum(hits) / len(hits) for kind, hits in sorted(right.items())}

    def after_evaluation(accuracy: dict[str, float]) -> None:
        stage.state["weights"] = reweigh(accuracy)
        export(accuracy)

    stage = Stage("decoder", trainer, batch_loss, evaluate, after_evaluation)
    stage.state["weights"] = dict(KIND_WEIGHTS)
    return stage
