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

from autoprune.tiny.architecture import VISUAL_TOKENS
from autoprune.tiny.attention import PREFIXED, use_attention
from autoprune.tiny.lessons import IGNORE, KIND_WEIGHTS, Layout, Lesson, Teacher, reweigh
from autoprune.tiny.pool import Pool
from autoprune.tiny.training import Stage
from autoprune.tiny.vision_training import encode, to_pixels

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
        self._run_layer = torch.compile(_run_layer, dynamic=False) if compiled else _run_layer

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """Pixels [batch, 3, 96, 96] and text [batch, tokens] -> logits [batch, tokens, words]."""
        model = self.llava.model
        with torch.no_grad():
            patches = encode(model.vision_tower, pixels)[:, 1:]
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
        return self.llava.lm_head(decoder.norm(hidden[:, PREFIX:]))


def _run_layer(
    layer: nn.Module,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    layout: tuple[int, tuple[tuple[int, int], ...]],
) -> Tensor:
    return layer(hidden, attention_mask=None, position_embeddings=rotary, layout=layout)


def answer_loss(logits: Tensor, lesson: Lesson) -> Tensor:
    """Weighted cross-entropy of the answers' tokens."""
    losses = F.cross_entropy(
        logits.float().flatten(0, 1),
        lesson.targets.flatten(),
        ignore_index=IGNORE,
        reduction="none",
    )
    weights = lesson.weights.flatten()
    return (losses * weights).sum() / weights.sum()


def right_answers(logits: Tensor, lesson: Lesson) -> dict[str, list[bool]]:
    """Per kind, whether each answer is predicted in full when its own tokens are fed back."""
    wrong = (logits.argmax(-1) != lesson.targets) & (lesson.targets != IGNORE)
    failed = set(lesson.answers[wrong].tolist())
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
            logits = trainer(to_pixels(pool.images[index], noise).to(device), lesson.ids)
        return logits, lesson

    def batch_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        noise = np.random.default_rng([seed, 2, step])
        index = np.sort(noise.integers(0, len(train), size=batch_size))
        logits, lesson = run(train, index, random.Random(f"{seed}-{step}"), noise)
        return answer_loss(logits, lesson), {}

    def evaluate() -> dict[str, float]:
        right: dict[str, list[bool]] = defaultdict(list)
        rng = random.Random(0)
        weights, stage.state["weights"] = stage.state["weights"], dict(KIND_WEIGHTS)
        for start in range(0, min(len(heldout), 20 * batch_size), batch_size):
            index = np.arange(start, start + batch_size)
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
