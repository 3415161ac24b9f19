"""`autoprune answer`: the questions of a file, answered into a file that LLaVA's scripts read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..evaluation.files import Asking, Engine, Outcome, answer_file
from ..evaluation.files.journal import Failure
from ..evaluation.files.prompts import conversation
from ..evaluation.files.questions import INSTRUCTIONS, LINES, QuestionFile
from ..methods.autoprune_reference import AutoPruneReference

EMBEDDED = "embedded"
"""What stands for the embedded model where a path is expected."""
_SHOWN = 20
_LLAVA_TOKENS, _LLAVA_TOKENS_OF_OPTIONS = 128, 1024
"""Length of answers in LLaVA's scripts, of JSON lines and of the other files."""


def answer(
    asking: Asking, answers_file: Path, engine: Engine, workers: int, console: Console
) -> None:
    """Answer the file; exit code 1 where a question has no answer, 130 after Ctrl-C.

    Raises:
        ValueError, UnsupportedError, ImportError: see `answer_file`.
    """
    errors = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    try:
        outcome = answer_file(asking, answers_file, engine, workers, True, errors.print)
    except KeyboardInterrupt:
        errors.print("autoprune: stopped; the same command goes on from here")
        raise SystemExit(130) from None
    if outcome is None:
        return
    answered = outcome.questions - len(outcome.failed)
    console.print(
        f"{answered} of {outcome.questions} questions answered: {answers_file}", soft_wrap=True
    )
    if outcome.failed:
        _complain(outcome, answers_file, errors)
        raise SystemExit(1)


def asking_as_released(
    *,
    questions: Path,
    images: Path,
    model_path: str,
    model_base: str | None,
    conv_mode: str,
    temperature: float,
    num_beams: int,
    target_token_num: float,
    curve: tuple[float, float, float],
    max_new_tokens: int | None,
    instruction: str,
    where: tuple[str, str],
    part: tuple[int, int],
    batch_size: int,
) -> Asking:
    """What a line of the released scripts asks for, under the released method.

    Args:
        curve: x0, k0, gamma. where: device, dtype. part: number of chunks, and which one.

    Raises:
        ValueError: a flag that is not understood here.
    """
    check_greedy(temperature, num_beams)
    if model_base is not None:
        raise ValueError(
            "--model-base is not understood: merge the adapter into its base model, save that, and give it as "
            "--model-path"
        )
    x0, k0, gamma = curve
    method = AutoPruneReference(target_token_num, x0=x0, k0=k0, gamma=gamma)
    if max_new_tokens is None:
        lines = QuestionFile(questions, images).format == LINES
        max_new_tokens = _LLAVA_TOKENS if lines else _LLAVA_TOKENS_OF_OPTIONS
    return Asking(
        questions,
        images,
        method,
        model=None if model_path == EMBEDDED else model_path,
        device=where[0],
        dtype=where[1],
        max_new_tokens=max_new_tokens,
        conversation=conversation(conv_mode),
        llava_pictures=True,
        instruction=instruction,
        batch_size=batch_size,
        num_chunks=part[0],
        chunk_idx=part[1],
    )


def check_greedy(temperature: float, num_beams: int = 1) -> None:
    """Raise ValueError unless answers are greedy."""
    if temperature != 0:
        raise ValueError(
            f"answers are greedy, so that they can be repeated: --temperature must be 0, got {temperature:g}"
        )
    if num_beams != 1:
        raise ValueError(f"answers are greedy: --num_beams must be 1, got {num_beams}")


def instruction(single_pred_prompt: bool, lang: str) -> str:
    """What is added to questions with options.

    Raises:
        ValueError: no such language.
    """
    if lang not in INSTRUCTIONS:
        raise ValueError(f"--lang must be one of {', '.join(INSTRUCTIONS)}, got {lang!r}")
    return INSTRUCTIONS[lang] if single_pred_prompt else ""


def _complain(outcome: Outcome, answers_file: Path, errors: Console) -> None:
    failed = outcome.failed
    errors.print(
        f"autoprune: {len(failed)} questions have no answer; the same command tries them again"
    )
    for line in _listed(failed[:_SHOWN]):
        errors.print(f"  {line}")
    if len(failed) > _SHOWN:
        errors.print(f"  and {len(failed) - _SHOWN} more, see {answers_file}.run/failed.jsonl")


def _listed(failed: Sequence[Failure]) -> list[str]:
    return [
        f"question {'?' if failure.id is None else failure.id}: {failure.reason}"
        for failure in failed
    ]
