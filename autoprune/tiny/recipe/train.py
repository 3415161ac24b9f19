"""Train the embedded model: `python -m autoprune.tiny.recipe.train --output runs/tiny`.

Two stages, then the export. Interrupt it at any time: the same command goes on from the last
checkpoint. On two CPU cores the defaults take under two hours, on a GPU minutes. Several
processes share the work under `torchrun --nproc-per-node 2 -m autoprune.tiny.recipe.train`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from autoprune.tiny.recipe.architecture import build_model, vision_config
from autoprune.tiny.recipe.chat import make_processor
from autoprune.tiny.recipe.decoder_training import DecoderTrainer, decoder_stage
from autoprune.tiny.recipe.export import export_model
from autoprune.tiny.recipe.lessons import Layout, Teacher
from autoprune.tiny.recipe.pool import Pool, open_pool
from autoprune.tiny.recipe.training import Plan, processes, rank, train_stage
from autoprune.tiny.recipe.vision_training import VisionPretrainer, transformer, vision_stage


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/tiny"), help="checkpoints, logs")
    parser.add_argument("--export", type=Path, help="folder of the model (default: OUTPUT/model)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vision-steps", type=int, default=5300)
    parser.add_argument("--decoder-steps", type=int, default=4500)
    parser.add_argument("--vision-minutes", type=float, help="end the stage by the clock as well")
    parser.add_argument("--decoder-minutes", type=float)
    parser.add_argument("--scenes", type=int, default=80_000, help="size of the training pool")
    parser.add_argument("--layers", type=int, default=16, help="decoder layers")
    parser.add_argument("--vision-layers", type=int, default=5)
    parser.add_argument("--vision-batch", type=int, default=64)
    parser.add_argument("--decoder-batch", type=int, default=16)
    parser.add_argument("--vision-rate", type=float, default=3e-3)
    parser.add_argument("--decoder-rate", type=float, default=2e-3)
    parser.add_argument("--evaluate-every", type=int, default=300)
    parser.add_argument("--checkpoint-seconds", type=float, default=60.0)
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def open_pools(options: argparse.Namespace) -> tuple[Pool, Pool]:
    """Training and held-out scenes; the first process draws them, the others wait for it."""
    if rank() > 0:
        dist.barrier()
    folder = options.output / "pool"
    pools = (
        open_pool(folder, options.scenes, "train"),
        open_pool(folder, min(2000, options.scenes), "heldout"),
    )
    if rank() == 0 and processes() > 1:
        dist.barrier()
    return pools


def train_vision(
    options: argparse.Namespace, pools: tuple[Pool, Pool], console: Console
) -> dict[str, Tensor]:
    """Stage one; returns the tower's weights, which it keeps in OUTPUT/vision.pt."""
    finished = options.output / "vision.pt"
    if finished.exists():
        return torch.load(finished, weights_only=True, map_location="cpu")
    torch.manual_seed(options.seed)
    model = VisionPretrainer(vision_config(options.vision_layers)).to(options.device)
    stage = vision_stage(
        model,
        *pools,
        device=options.device,
        batch_size=options.vision_batch,
        seed=options.seed,
        compiled=not options.no_compile,
    )
    plan = Plan(
        steps=options.vision_steps,
        minutes=options.vision_minutes,
        learning_rate=options.vision_rate,
        evaluate_every=options.evaluate_every,
        checkpoint_seconds=options.checkpoint_seconds,
        seed=options.seed,
    )
    train_stage(stage, plan, options.output, console)
    weights = transformer(model.tower).state_dict()
    if rank() == 0:
        torch.save(weights, finished)
    return weights


def train_decoder(
    options: argparse.Namespace,
    tower: dict[str, Tensor],
    pools: tuple[Pool, Pool],
    console: Console,
) -> LlavaForConditionalGeneration:
    """Stage two; exports the averaged weights at every evaluation and at the end."""
    folder = options.export or options.output / "model"
    processor = make_processor()
    torch.manual_seed(options.seed)
    model = build_model(processor.tokenizer, options.layers, options.vision_layers)
    transformer(model.model.vision_tower).load_state_dict(tower)
    layout = Layout()
    trainer = DecoderTrainer(model, processor.tokenizer, layout, not options.no_compile)
    stage = decoder_stage(
        trainer.to(options.device),
        Teacher(processor.tokenizer, layout),
        *pools,
        device=options.device,
        batch_size=options.decoder_batch,
        seed=options.seed,
        export=lambda accuracy: _export(model, processor, folder),
    )
    plan = Plan(
        steps=options.decoder_steps,
        minutes=options.decoder_minutes,
        learning_rate=options.decoder_rate,
        evaluate_every=options.evaluate_every,
        checkpoint_seconds=options.checkpoint_seconds,
        seed=options.seed,
    )
    train_stage(stage, plan, options.output, console)
    _export(model, processor, folder)
    console.print(f"model written to {folder}")
    return model


def _export(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    if rank() == 0:
        export_model(model, processor, folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is left of the recipe."""
    options = parse(arguments)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    console = Console(quiet=rank() > 0)
    with console.status("drawing scenes"):
        pools = open_pools(options)
    tower = train_vision(options, pools, console)
    train_decoder(options, tower, pools, console)


if __name__ == "__main__":
    main()
