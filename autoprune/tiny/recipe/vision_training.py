"""Stage one: the vision tower alone, on labels of every patch and of the whole picture.

The losses sit on the hidden states that the decoder will be given (the last block's output, no
final norm), so patch features hold what and where, and the CLS token's attention in that block
looks at what is in the picture.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from autoprune.tiny.recipe.attention import PLAIN, use_attention
from autoprune.tiny.recipe.pool import IGNORE, NUM_PRESENCE, PATCH_TARGETS, Pool
from autoprune.tiny.recipe.training import Stage, processes, rank

BACKGROUND_WEIGHT = 0.3
TARGET_WEIGHTS = {"letter_slot": 0.5, "row": 0.5, "column": 0.5}


class VisionPretrainer(nn.Module):
    """The vision tower with one linear probe for the patches and one for the CLS token."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(config)
        self.patch_head = nn.Linear(config.hidden_size, sum(PATCH_TARGETS.values()))
        self.presence_head = nn.Linear(config.hidden_size, NUM_PRESENCE)
        # The pooled output is not used: the norm behind it stays as initialised.
        transformer(self.tower).post_layernorm.requires_grad_(False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [batch, 3, 96, 96] -> logits of patches [batch, 144, *] and of presence."""
        hidden = encode(self.tower, pixels)
        return self.patch_head(hidden[:, 1:]), self.presence_head(hidden[:, 0])


def transformer(tower: CLIPVisionModel) -> nn.Module:
    """The module with embeddings and encoder, which transformers versions nest differently."""
    return getattr(tower, "vision_model", tower)


def run_layer(layer: nn.Module, hidden: Tensor) -> Tensor:
    """One block of the tower."""
    return layer(hidden, attention_mask=None)


def encode(
    tower: CLIPVisionModel,
    pixels: Tensor,
    run: Callable[[nn.Module, Tensor], Tensor] = run_layer,
) -> Tensor:
    """The hidden states LLaVA takes from the tower, CLS first, [batch, 145, width]."""
    model = transformer(tower)
    hidden = model.pre_layrnorm(model.embeddings(pixels))
    with use_attention(tower, PLAIN):
        for layer in model.encoder.layers:
            hidden = run(layer, hidden)
    return hidden


def to_pixels(images: np.ndarray, noise: np.random.Generator | None = None) -> Tensor:
    """uint8 [batch, 96, 96, 3] -> [batch, 3, 96, 96] in -1..1, jittered when `noise` is given."""
    pixels = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    if noise is None:
        return pixels
    batch = len(pixels)
    gain = torch.from_numpy(noise.uniform(0.88, 1.12, (batch, 1, 1, 1)).astype(np.float32))
    shift = torch.from_numpy(noise.uniform(-0.06, 0.06, (batch, 3, 1, 1)).astype(np.float32))
    strength = torch.from_numpy(noise.uniform(0, 0.08, (batch, 1, 1, 1)).astype(np.float32))
    return (pixels * gain + shift + strength * torch.randn(pixels.shape)).clamp(-1, 1)


def vision_loss(
    patch_logits: Tensor, presence_logits: Tensor, labels: Tensor, presence: Tensor
) -> Tensor:
    """Patch cross-entropies plus the multi-label loss of the CLS token.

    Patches with an object and background patches are averaged apart: most patches are background.
    """
    labels = labels.long()
    on_object = (labels[:, :3] > 0).any(dim=1).flatten()
    background = (labels[:, :3] == 0).all(dim=1).flatten()
    total = F.binary_cross_entropy_with_logits(presence_logits.float(), presence.float()) * 10
    for index, (name, logits) in enumerate(_split(patch_logits).items()):
        losses = F.cross_entropy(
            logits.float().flatten(0, 1),
            labels[:, index].flatten(),
            ignore_index=IGNORE,
            reduction="none",
        )
        mean = (losses * on_object).sum() / on_object.sum().clamp(min=1)
        rest = (losses * background).sum() / background.sum().clamp(min=1)
        total = total + TARGET_WEIGHTS.get(name, 1.0) * (mean + BACKGROUND_WEIGHT * rest)
    return total


def _split(patch_logits: Tensor) -> dict[str, Tensor]:
    sizes = list(PATCH_TARGETS.values())
    return dict(zip(PATCH_TARGETS, patch_logits.split(sizes, dim=-1), strict=True))


def vision_stage(
    model: VisionPretrainer,
    train: Pool,
    heldout: Pool,
    device: str = "cpu",
    batch_size: int = 64,
    seed: int = 0,
    compiled: bool = True,
) -> Stage:
    """The stage that trains the vision tower."""
    forward = torch.compile(model, dynamic=False) if compiled else model

    def batch_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([seed, 1, step, rank()])
        index = np.sort(rng.integers(0, len(train), size=batch_size // processes()))
        pixels = to_pixels(train.images[index], noise=rng).to(device)
        labels = torch.from_numpy(train.patch_labels[index]).to(device)
        presence = torch.from_numpy(train.presence[index]).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            patch_logits, presence_logits = forward(pixels)
        return vision_loss(patch_logits, presence_logits, labels, presence), {}

    def evaluate() -> dict[str, float]:
        return patch_accuracy(model, heldout, device)

    return Stage("vit", model, batch_loss, evaluate)


def patch_accuracy(
    model: VisionPretrainer, pool: Pool, device: str = "cpu", scenes: int = 500
) -> dict[str, float]:
    """Accuracy per patch target over patches that hold an object, and of the CLS presence."""
    right: dict[str, list[Tensor]] = {name: [] for name in PATCH_TARGETS}
    missed: list[Tensor] = []
    for start in range(0, min(scenes, len(pool)), 100):
        chosen = slice(start, start + 100)
        pixels = to_pixels(pool.images[chosen]).to(device)
        labels = torch.from_numpy(pool.patch_labels[chosen]).long().to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            patch_logits, presence_logits = model(pixels)
        on_object = (labels[:, :3] > 0).any(dim=1)
        for index, (name, logits) in enumerate(_split(patch_logits).items()):
            relevant = on_object & (labels[:, index] > 0)
            right[name].append((logits.argmax(-1) == labels[:, index])[relevant])
        present = torch.from_numpy(pool.presence[chosen]).to(device).bool()
        missed.append(((presence_logits > 0) != present).float().sum(-1))
    accuracy = {name: torch.cat(hits).float().mean().item() for name, hits in right.items()}
    return accuracy | {"presence_errors_per_scene": torch.cat(missed).mean().item()}
