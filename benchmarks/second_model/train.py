"""Train the second benchmark model: the tower alone, then all with questions. See README.md.

    python train.py tower --minutes 1.5 --folder RUN
    python train.py decoder --minutes 6 --folder RUN

Time drives everything: the learning rates fall to zero over the minutes given. A stage that was cut off goes
on from its last checkpoint when it is started again with the same folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import Clock, Drawing, heldout_batch, packed_batch, tower_batch
from model import Adapter, build, decoder_file, load_decoder, save_weights, trained
from numpy.typing import NDArray
from packed import IGNORED, Packer, answer_logits, answer_places, block, features, tower_states
from scenes import IMAGE_SIZE, LABEL_SIZES, PATCHES
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

CHECKPOINT_SECONDS = 90


def main() -> None:
    """Run one stage."""
    options = arguments().parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    # Its plans take longer to make than they save here.
    torch.backends.cuda.enable_cudnn_sdp(False)
    {"tower": train_tower, "decoder": train_decoder}[options.stage](options)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("tower", "decoder"))
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--decoder", type=Path, help="GGUF file or a folder of save_pretrained")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="pictures in a step")
    parser.add_argument("--length", type=int, default=301, help="text tokens behind a picture")
    parser.add_argument("--processes", type=int, default=15, help="that draw scenes")
    parser.add_argument("--width", type=int, default=192, help="of the tower")
    parser.add_argument("--layers", type=int, default=6, help="of the tower")
    parser.add_argument("--rank", type=int, default=12, help="of the adapter")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--heldout", type=int, default=48, help="questions of each kind")
    parser.add_argument("--report-seconds", type=float, default=60)
    parser.add_argument("--compile", action="store_true", help="compile the decoder's layer")
    return parser


class Run:
    """Learning rates, checkpoints and reports of one stage."""

    def __init__(self, options: argparse.Namespace, parts: nn.Module, rates: dict[str, float]):
        self.options, self.parts = options, parts
        self.clock = Clock(60 * options.minutes)
        groups = [
            {"params": list(part.parameters()), "rate": rates[name] * options.rate}
            for name, part in parts.items()
        ]
        cuda = options.device == "cuda"
        self.optimizer = torch.optim.AdamW(
            groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=cuda
        )
        self.checkpoint = options.folder / f"{options.stage}.pt"
        self.steps = self.skipped = 0
        self.saved = self.reported = 0.0
        self.losses: list[Tensor] = []

    def start(self) -> None:
        """Begin, or go on from the checkpoint."""
        elapsed = 0.0
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, map_location=self.options.device)
            self.parts.load_state_dict(state["parts"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.steps, elapsed = state["steps"], state["elapsed"]
        self.clock.start(elapsed)
        self.saved = self.reported = elapsed
        self.steps_before = self.steps

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return self.clock.progress >= 1

    def update(self, loss: Tensor) -> None:
        """Step with the gradients that lie there; not where they are no numbers."""
        progress = self.clock.progress
        factor = min(1.0, progress / 0.03 + 0.01) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        norm = nn.utils.clip_grad_norm_(self.parts.parameters(), 1.0)
        bad = ~torch.isfinite(norm)
        # Asking the device for `bad` would wait for it; zeros change next to nothing.
        for parameter in self.parts.parameters():
            if parameter.grad is not None:
                parameter.grad = torch.where(bad, 0.0, parameter.grad)
        self.skipped = self.skipped + bad
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        self.losses.append(loss.detach())

    def due(self) -> bool:
        """Whether it is time for a report; saves where it is time to save."""
        elapsed = self.clock.elapsed
        if elapsed - self.saved > CHECKPOINT_SECONDS:
            self.save()
        # One early report says what bounds the speed.
        early = self.reported == 0 and elapsed > self.options.report_seconds / 3
        return early or elapsed - self.reported > self.options.report_seconds

    def save(self) -> None:
        """Write the checkpoint."""
        state = {
            "parts": self.parts.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "elapsed": self.clock.elapsed,
        }
        draft = self.checkpoint.with_suffix(".draft")
        torch.save(state, draft)
        draft.replace(self.checkpoint)
        self.saved = self.clock.elapsed

    def report(self, **found: object) -> None:
        """Print a line and append it to the stage's log."""
        elapsed = self.clock.elapsed
        line = {
            "stage": self.options.stage,
            "seconds": round(elapsed, 1),
            "steps": self.steps,
            "loss": round(float(torch.stack(self.losses).mean()), 4) if self.losses else None,
            "skipped": int(self.skipped),
            **found,
        }
        if self.options.device == "cuda":
            line["peak_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        print(json.dumps(line), flush=True)
        with (self.options.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        self.losses = []
        self.reported = self.clock.elapsed


def train_tower(options: argparse.Namespace) -> None:
    """Teach the tower what each patch shows; writes tower.pt."""
    batch = options.batch or 512
    drawing = Drawing(lambda seed: tower_batch(seed, 128), 128, options.processes)
    config = SiglipVisionConfig(
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=max(options.width // 64, 1),
        image_size=IMAGE_SIZE,
        patch_size=IMAGE_SIZE // PATCHES,
        vision_use_head=False,
    )
    parts = nn.ModuleDict(
        {"tower": SiglipVisionModel(config), "head": nn.Linear(options.width, sum(LABEL_SIZES))}
    ).to(options.device)
    run = Run(options, parts, {"tower": 1.0, "head": 1.0})
    heldout = [torch.from_numpy(part).to(options.device) for part in _heldout_patches(256)]
    pool = _Pool(options.device)
    pool.add(drawing.next())
    run.start()
    while not run.over:
        for _, drawn in zip(range(3), drawing.waiting(), strict=False):
            pool.add(drawn)
        pixels, labels = pool.sample(batch)
        with _mixed(options.device):
            loss = _patch_loss(parts, pixels, labels)
        loss.backward()
        run.update(loss)
        if run.due():
            run.report(patches=_patch_accuracy(parts, *heldout), drawn=pool.drawn)
    run.save()
    run.report(patches=_patch_accuracy(parts, *heldout), drawn=pool.drawn)
    drawing.stop()


class _Pool:
    """The last pictures drawn, on the device: the tower learns faster than they are drawn."""

    def __init__(self, device: str, size: int = 200_000) -> None:
        size = size if device == "cuda" else 20_000
        self.pixels = torch.empty(size, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8, device=device)
        self.labels = torch.empty(size, PATCHES, PATCHES, 4, dtype=torch.uint8, device=device)
        self.drawn = 0

    def add(self, drawn) -> None:
        start = self.drawn % (len(self.pixels) - len(drawn[0]))
        for pool, part in zip((self.pixels, self.labels), drawn, strict=True):
            pool[start : start + len(part)] = _on(pool.device, part)
        self.drawn += len(drawn[0])

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        filled = min(self.drawn, len(self.pixels) - 128)
        chosen = torch.randint(filled, (count,), device=self.pixels.device)
        return self.pixels[chosen], self.labels[chosen]


def _heldout_patches(pictures: int):
    from scenes import draw_scene, patch_labels

    scenes = [draw_scene(5_000_000 + index) for index in range(pictures)]
    pixels = torch.stack([torch.from_numpy(scene.pixels) for scene in scenes]).numpy()
    labels = torch.stack([torch.from_numpy(patch_labels(scene)) for scene in scenes])
    return pixels, labels.to(torch.uint8).numpy()


def _patch_logits(parts: nn.ModuleDict, pixels: Tensor) -> tuple[Tensor, ...]:
    states = tower_states(parts["tower"], pixels)
    return parts["head"](states).float().split(LABEL_SIZES, dim=-1)


def _patch_loss(parts: nn.ModuleDict, pixels: Tensor, labels: Tensor) -> Tensor:
    """Mean over the four labels; where there is nothing to name counts a fifth."""
    losses = []
    for logits, wanted in zip(
        _patch_logits(parts, pixels), labels.flatten(1, 2).unbind(-1), strict=True
    ):
        weight = torch.ones(logits.shape[-1], device=logits.device)
        weight[0] = 0.2
        losses.append(F.cross_entropy(logits.flatten(0, 1), wanted.flatten().long(), weight))
    return torch.stack(losses).mean()


@torch.no_grad()
def _patch_accuracy(parts: nn.ModuleDict, pixels: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy over the patches that show a symbol, its colour, a digit, a word."""
    with _mixed(pixels.device.type):
        logits = _patch_logits(parts, pixels)
    found = {}
    names = ("symbol", "colour", "digit", "word")
    for name, scores, wanted in zip(names, logits, labels.flatten(1, 2).unbind(-1), strict=True):
        right = scores.argmax(-1) == wanted
        found[name] = round(float(right[wanted > 0].float().mean()), 3)
    return found


def train_decoder(options: argparse.Namespace) -> None:
    """Teach projector, adapter and tower to answer; writes weights.safetensors and decoder.pt."""
    batch = options.batch or 64
    language, tokenizer = load_decoder(options.decoder or decoder_file())
    packer = Packer(tokenizer, options.length)
    clock = Clock(60 * options.minutes)
    drawing = Drawing(
        lambda seed: packed_batch(seed, batch, packer, clock.progress), batch, options.processes
    )
    model = build(language, tokenizer, options.width, options.layers)
    model.requires_grad_(False)
    parts = trained(model, Adapter(model.model.language_model, options.rank))
    for part in parts.values():
        part.requires_grad_(True)
    _take_tower(options, parts["tower"])
    model.to(options.device)
    parts.to(options.device)
    kinds, *heldout = heldout_batch(options.heldout, Packer(tokenizer, 77))
    scale_projector(model, _on(options.device, heldout[0][:64]))
    run = Run(options, parts, {"tower": 0.4, "projector": 0.7, "adapter": 1.0})
    run.clock = clock
    step = Step(model, parts["adapter"], packer.head, options)
    # Before the clock starts: what has to be compiled, and how many pictures fit.
    step(*drawing.next())
    run.optimizer.zero_grad(set_to_none=True)
    run.start()
    tokens, waited = 0, 0.0
    while not run.over:
        before = time.time()
        pixels, rows = drawing.next()
        waited += time.time() - before
        tokens += int((rows[:, 3] != IGNORED).sum())
        run.update(step(pixels, rows))
        if run.due():
            run.report(
                pictures=(run.steps - run.steps_before) * batch,
                answer_tokens=tokens,
                waited=round(waited, 1),
                parts=step.parts,
                heldout=step.accuracy(kinds, *heldout),
            )
            save_weights(options.folder / "weights.safetensors", parts)
    save_weights(options.folder / "weights.safetensors", parts)
    run.save()
    run.report(
        pictures=(run.steps - run.steps_before) * batch,
        answer_tokens=tokens,
        waited=round(waited, 1),
        parts=step.parts,
        heldout=step.accuracy(kinds, *heldout),
        swapped=step.accuracy(kinds, np.roll(heldout[0], len(set(kinds)), 0), heldout[1]),
    )
    drawing.stop()


class Step:
    """Loss and gradients of a batch, in several parts where it does not fit into memory."""

    def __init__(self, model, adapter: Adapter, head: list[int], options: argparse.Namespace):
        self.model, self.adapter, self.device = model, adapter, options.device
        self.head = torch.tensor(head, device=options.device)
        self.parts = 1
        self.run_block = torch.compile(block, dynamic=False) if options.compile else block

    def __call__(self, pixels: NDArray, rows: NDArray) -> Tensor:
        """The mean loss over the answers' tokens; the gradients lie with the parameters."""
        while True:
            try:
                return self._attempt(pixels, rows)
            except torch.cuda.OutOfMemoryError:
                if self.parts >= 8:
                    raise
                self.parts *= 2
                print(f"out of memory: {self.parts} parts from now on", flush=True)
            except Exception as error:
                if self.run_block is block:
                    raise
                self.run_block = block
                print(f"goes on without compilation: {error}"[:400], flush=True)
            for part in (self.model, self.adapter):
                part.zero_grad(set_to_none=True)
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def _attempt(self, pixels: NDArray, rows: NDArray) -> Tensor:
        total = torch.zeros((), device=self.device)
        wanted = int((rows[:, 3] != IGNORED).sum())
        size = len(rows) // self.parts
        for start in range(0, len(rows), size):
            some = slice(start, start + size)
            logits, targets = self._logits(pixels[some], rows[some], self.run_block)
            loss = F.cross_entropy(logits.float(), targets, reduction="sum") / wanted
            loss.backward()
            total += loss.detach()
        return total

    def _logits(self, pixels: NDArray, rows: NDArray, run_block) -> tuple[Tensor, Tensor]:
        places = answer_places(rows)
        targets = _on(self.device, rows[:, 3].reshape(-1)[places])
        with _mixed(self.device):
            visual = features(self.model, _on(self.device, pixels))
        if self.device == "cuda":
            visual = visual.bfloat16()
        there = _on(self.device, rows), _on(self.device, places)
        logits = answer_logits(self.model, self.adapter, visual, *there, self.head, run_block)
        return logits, targets

    @torch.no_grad()
    def accuracy(self, kinds: list[str], pixels: NDArray, rows: NDArray) -> dict[str, float]:
        """Share of questions of each kind whose whole answer has the highest logits."""
        found = defaultdict(list)
        for start in range(0, len(kinds), 96):
            some = slice(start, start + 96)
            logits, targets = self._logits(pixels[some], rows[some], block)
            lengths = (rows[some, 3] != IGNORED).sum(-1).tolist()
            hits = (logits.argmax(-1) == targets).cpu().split(lengths)
            for kind, answer in zip(kinds[some], hits, strict=True):
                found[kind].append(bool(answer.all()))
        return {kind: round(sum(right) / len(right), 3) for kind, right in found.items()}


@torch.no_grad()
def scale_projector(model, pixels: Tensor) -> None:
    """Let visual tokens start as large as words: the norm of their embeddings."""
    projector = model.model.multi_modal_projector
    states = tower_states(model.model.vision_tower, pixels)
    size = states.pow(2).mean().sqrt()
    nn.init.normal_(projector.linear_1.weight, std=float(1 / size / states.shape[-1] ** 0.5))
    wanted = model.get_input_embeddings().weight.pow(2).mean().sqrt()
    found = projector(states).pow(2).mean().sqrt()
    projector.linear_2.weight *= wanted / found


def _take_tower(options: argparse.Namespace, tower: nn.Module) -> None:
    path = options.folder / "tower.pt"
    if not path.exists():
        print("no tower.pt here: the tower starts untrained", flush=True)
        return
    state = torch.load(path, map_location="cpu")["parts"]
    tower.load_state_dict(
        {name.removeprefix("tower."): value for name, value in state.items() if "tower." in name}
    )


def _on(device: str | torch.device, array: NDArray) -> Tensor:
    """On the device, without waiting for it."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _mixed(device: str):
    if device == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


if __name__ == "__main__":
    main()
