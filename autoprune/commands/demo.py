"""`autoprune demo`: the embedded model answers questions about a picture, whole and pruned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..files import check_file, make_folder, write_whole
from ..loading import Loaded, load_embedded, prepare
from ..methods.base import Method
from ..trace import Sample
from ..viz import kept_patches, tile, to_png
from .answers import answer, answer_pruned
from .pictures import as_seen
from .report import bits, can_draw, print_json, sample_record, saved, sparkline

if TYPE_CHECKING:
    from ..tiny.questions import Question
    from ..tiny.scenes import Scene

DEFAULT_SEED = 1518
MAX_NEW_TOKENS = 48
_MAX_SCENES = 50
_MAX_ROWS = 5


@dataclass(frozen=True)
class Result:
    """One question, and what the model made of it with all and with pruned visual tokens."""

    scene: Scene
    question: Question
    full: str
    pruned: str
    sample: Sample
    full_is_correct: bool
    pruned_is_correct: bool


def demo(
    method: Method,
    seed: int,
    kinds: Sequence[str] | None,
    output: Path,
    console: Console,
    as_json: bool = False,
) -> None:
    """Ask one question of each kind, show both answers and what was saved, write the picture.

    Args:
        kinds: some of `tiny.KINDS`; default: the easy and hard ones.

    Raises:
        ValueError: an unknown kind, or an output folder that cannot be made.
    """
    asked = list(_questions(seed, kinds))
    picture = _picture_path(output)
    loaded = load_embedded()
    results = [_compare(loaded, method, scene, question) for scene, question in asked]
    _draw(loaded, results, picture)
    if as_json:
        print_json(console, [_record(result) for result in results])
    else:
        _show(loaded, method, results, picture, console)


def _questions(seed: int, kinds: Sequence[str] | None) -> Iterator[tuple[Scene, Question]]:
    """One question of each kind; those that the first scene cannot answer come from the next."""
    from .. import tiny

    missing = list(dict.fromkeys((*tiny.EASY, *tiny.HARD) if kinds is None else kinds))
    if not missing or not set(missing) <= set(tiny.KINDS):
        raise ValueError(
            f"kinds must be some of {', '.join(tiny.KINDS)}, got {', '.join(missing) or 'none'}"
        )
    for offset in range(_MAX_SCENES):
        if not missing:
            return
        scene = tiny.draw_scene(seed + offset, split="heldout")
        # Asked one by one, a kind's question does not depend on which others are wanted.
        for question in [found for kind in missing for found in tiny.ask(scene, seed, [kind])]:
            missing.remove(question.kind)
            yield scene, question


def _picture_path(output: Path) -> Path:
    picture = make_folder(output) / "kept_patches.png"
    check_file(picture)
    return picture


def _compare(loaded: Loaded, method: Method, scene: Scene, question: Question) -> Result:
    from .. import tiny

    inputs = prepare(loaded, scene.image, question.text)
    full = answer(loaded, inputs, MAX_NEW_TOKENS).text
    given, sample = answer_pruned(loaded, inputs, method, MAX_NEW_TOKENS)
    return Result(
        scene,
        question,
        full,
        given.text,
        sample,
        tiny.is_correct(question, full),
        tiny.is_correct(question, given.text),
    )


def _draw(loaded: Loaded, results: Sequence[Result], path: Path) -> None:
    rows = []
    for result in results:
        inputs = prepare(loaded, result.scene.image, result.question.text)
        image, grid = as_seen(loaded, inputs, result.scene.image)
        title = f"{result.question.text}  {result.pruned}"
        rows.append(kept_patches(image, result.sample, grid, title=title))
    write_whole(path, to_png(tile(rows, columns=1 if len(rows) <= _MAX_ROWS else 2)))


def _show(
    loaded: Loaded, method: Method, results: Sequence[Result], picture: Path, console: Console
) -> None:
    total = results[0].sample.num_visual
    table = Table(show_edge=False, pad_edge=False, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("question", overflow="fold", min_width=18)
    table.add_column(f"all {total}\ntokens", overflow="fold")
    table.add_column("pruned", overflow="fold")
    table.add_column("MI", justify="right", no_wrap=True)
    table.add_column("tokens per layer", no_wrap=True)
    table.add_column("FLOPs", justify="right", no_wrap=True)
    table.add_column("KV", justify="right", no_wrap=True)
    for result in results:
        sample = result.sample
        table.add_row(
            result.question.text,
            _marked(result.full, result.full_is_correct, console),
            _marked(result.pruned, result.pruned_is_correct, console),
            bits(sample.mutual_information),
            sparkline(sample.tokens_per_layer, total, can_draw(console)),
            f"-{saved(sample.total_flops, sample.flops_full)}",
            f"-{saved(sample.kv_bytes, sample.kv_bytes_full)}",
        )
    console.print(table)
    console.print()
    console.print(_verdict(method, results))
    counts = ", ".join(str(count) for count in results[0].sample.tokens_per_layer)
    console.print(f"Visual tokens entering each layer, first question: {counts}")
    console.print(f"Picture with the kept patches: {picture}", soft_wrap=True)


def _verdict(method: Method, results: Sequence[Result]) -> str:
    samples = [result.sample for result in results]
    mean = sum(sample.mean_tokens for sample in samples) / len(samples)
    share = 1 - mean / samples[0].num_visual
    right = sum(result.pruned_is_correct for result in results)
    full = sum(result.full_is_correct for result in results)
    return (
        f"{method.name}: {right} of {len(results)} right with {mean:.4g} of "
        f"{samples[0].num_visual} visual tokens per layer ({share:.1%} pruned), "
        f"{full} of {len(results)} with all of them."
    )


def _marked(given: str, is_correct: bool, console: Console) -> Text:
    marks = ("✓", "✗") if can_draw(console) else ("ok", "wrong")
    mark, style = (marks[0], "green") if is_correct else (marks[1], "red")
    return Text.assemble(f"{given} ", (mark, style))


def _record(result: Result) -> dict[str, object]:
    return {
        "scene": result.scene.seed,
        "kind": result.question.kind,
        "question": result.question.text,
        "expected": result.question.answer,
        "answer_unpruned": result.full,
        "answer": result.pruned,
        "correct_unpruned": result.full_is_correct,
        "correct": result.pruned_is_correct,
        **sample_record(result.sample),
    }
