"""One training loop for both stages: schedule, clipping, averaged weights, checkpoints, resume."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from autoprune.tiny.recipe.optimiser import make_optimisers


@dataclass
class Plan:
    """How long and how fast a stage trains.

    Give `minutes` (wall clock, summed over interruptions) or `steps`; with both, the stage ends
    at whichever comes first. The learning rate warms up linearly and falls along a cosine.
    """

    steps: int | None = None
    minutes: float | None = None
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup: float = 0.03
    final_rate: float = 0.02
    average: float = 0.998
    evaluate_every: int = 500
    checkpoint_seconds: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("a training plan needs steps or minutes, got neither")

    def progress(self, step: int, seconds: float) -> float:
        """Share of the stage that is done, in 0..1."""
        shares = []
        if self.steps is not None:
            shares.append(step / self.steps)
        if self.minutes is not None:
            shares.append(seconds / (60 * self.minutes))
        return min(1.0, max(shares))

    def rate(self, progress: float) -> float:
        """Learning rate at a share of the stage."""
        if progress < self.warmup:
            return self.learning_rate * max(progress / self.warmup, 0.02)
        fall = torch.tensor((progress - self.warmup) / (1 - self.warmup) * torch.pi)
        cosine = 0.5 * (1 + torch.cos(fall).item())
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * cosine)


@dataclass
class Stage:
    """One stage of the recipe.

    Parameters
    ----------
    name : names the checkpoint and the log
    module : holds every trained parameter (those with requires_grad)
    loss : step -> (scalar loss, metrics to log); draws its own batch from the step's number
    evaluate : metrics on held-out scenes with the module's current weights
    after_evaluation : called with the metrics of the averaged weights, while they are in place
    """

    name: str
    module: nn.Module
    loss: Callable[[int], tuple[Tensor, dict[str, float]]]
    evaluate: Callable[[], dict[str, float]]
    after_evaluation: Callable[[dict[str, float]], None] = lambda metrics: None
    state: dict = field(default_factory=lambda: {"step": 0, "seconds": 0.0})


def train_stage(stage: Stage, plan: Plan, output: Path, console: Console | None = None) -> None:
    """Train a stage to the end of its plan, continuing from its checkpoint if there is one.

    On return the module holds the averaged weights.
    """
    console = console or Console()
    output.mkdir(parents=True, exist_ok=True)
    parameters = {n: p for n, p in stage.module.named_parameters() if p.requires_grad}
    optimisers = _optimisers(parameters, plan)
    average = {name: value.detach().clone() for name, value in parameters.items()}
    checkpoint = output / f"{stage.name}.pt"
    if checkpoint.exists():
        _restore(checkpoint, stage, parameters, average, optimisers)
        console.log(f"{stage.name}: resumed at step {stage.state['step']}")
    log = output / f"{stage.name}.jsonl"
    with _progress_bar(console) as bar:
        task = bar.add_task(stage.name, total=100, note="")
        saved = started = time.monotonic()
        base = stage.state["seconds"]
        while True:
            share = _agreed(plan.progress(stage.state["step"], stage.state["seconds"]))
            if share >= 1.0:
                break
            metrics = _step(stage, parameters, average, optimisers, plan, share)
            stage.state["seconds"] = base + time.monotonic() - started
            note = f"loss {metrics['loss']:.3f} step {stage.state['step']}"
            bar.update(task, completed=100 * share, note=note)
            if stage.state["step"] % plan.evaluate_every == 0:
                _report(stage, parameters, average, metrics, log, console)
            if rank() == 0 and time.monotonic() - saved > plan.checkpoint_seconds:
                _save(checkpoint, stage, parameters, average, optimisers)
                saved = time.monotonic()
    if rank() == 0:
        _save(checkpoint, stage, parameters, average, optimisers)
    _swap(parameters, average)


def rank() -> int:
    """This process's number among those that train together, 0 when it trains alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many processes train together, each on its share of every batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _agreed(value: float) -> float:
    """The first process's value: clocks differ, and all must take the same steps."""
    if processes() == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(shared, src=0)
    return shared.item()


def _average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make every process's gradients the mean over the processes."""
    if processes() == 1:
        return
    gradients = [parameter.grad for parameter in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= processes()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _optimisers(parameters: dict[str, nn.Parameter], plan: Plan) -> list[torch.optim.Optimizer]:
    hidden = [p for n, p in parameters.items() if p.ndim == 2 and "layers." in n]
    chosen = {id(p) for p in hidden}
    other = [p for p in parameters.values() if id(p) not in chosen]
    return make_optimisers(hidden, other, plan.learning_rate, plan.weight_decay)


def _step(stage, parameters, average, optimisers, plan: Plan, share: float) -> dict[str, float]:
    torch.manual_seed((plan.seed * 1_000_003 + stage.state["step"]) * processes() + rank())
    stage.module.train()
    loss, metrics = stage.loss(stage.state["step"])
    loss.backward()
    _average_gradients(parameters.values())
    nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = plan.rate(share)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    stage.state["step"] += 1
    decay = min(plan.average, stage.state["step"] / (stage.state["step"] + 10))
    with torch.no_grad():
        torch._foreach_lerp_(
            list(average.values()), [p.detach() for p in parameters.values()], 1 - decay
        )
    return {"loss": loss.item(), "lr": plan.rate(share), **metrics}


def _report(stage, parameters, average, metrics, log: Path, console: Console) -> None:
    """Log the held-out metrics of the averaged weights."""
    stage.module.eval()
    _swap(parameters, average)
    with torch.no_grad():
        heldout = stage.evaluate()
    record = {"step": stage.state["step"], "seconds": round(stage.state["seconds"], 1)}
    record |= {name: round(value, 4) for name, value in {**metrics, **heldout}.items()}
    if rank() == 0:
        with open(log, "a") as file:
            file.write(json.dumps(record) + "\n")
        console.log(record)
    stage.after_evaluation(heldout)
    _swap(parameters, average)


def _swap(parameters: dict[str, nn.Parameter], average: dict[str, Tensor]) -> None:
    """Exchange the raw and the averaged weights in place."""
    with torch.no_grad():
        for name, value in parameters.items():
            raw = value.detach().clone()
            value.copy_(average[name])
            average[name].copy_(raw)


def _save(path: Path, stage, parameters, average, optimisers) -> None:
    """Write a checkpoint so that being killed leaves the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    torch.save(
        {
            "parameters": {name: value.detach() for name, value in parameters.items()},
            "average": average,
            "optimisers": [optimiser.state_dict() for optimiser in optimisers],
            "state": stage.state,
        },
        temporary,
    )
    os.replace(temporary, path)


def _restore(path: Path, stage, parameters, average, optimisers) -> None:
    device = next(iter(parameters.values())).device
    saved = torch.load(path, map_location=device, weights_only=True)
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(saved["parameters"][name])
            average[name].copy_(saved["average"][name])
    for optimiser, state in zip(optimisers, saved["optimisers"], strict=True):
        optimiser.load_state_dict(state)
    stage.state.update(saved["state"])


def _progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        refresh_per_second=1,
    )
