"""`autoprune answer`, the scripts of LLaVA that it stands in for, and `autoprune score`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Dtype, Json, MethodOrFile, Model, Settings, console


class Engine(str, Enum):
    local = "local"
    ray = "ray"


QuestionFile = Annotated[
    Path,
    typer.Option(help="LLaVA's JSON lines, ScienceQA's JSON, or MMBench's tsv."),
]
ImageFolder = Annotated[Path, typer.Option(help="Where the pictures are.")]
AnswersFile = Annotated[
    Path, typer.Option(help="JSON lines, one for each question; a run that was stopped goes on.")
]
NumChunks = Annotated[int, typer.Option(min=1, help="Cut the file into so many parts ...")]
ChunkIdx = Annotated[int, typer.Option(min=0, help="... and answer this one, from 0.")]
Temperature = Annotated[float, typer.Option(help="0: answers are greedy.")]
SinglePredPrompt = Annotated[
    bool, typer.Option("--single-pred-prompt", help="Ask for the letter of an option alone.")
]
Lang = Annotated[str, typer.Option(help="Of --single-pred-prompt: en or cn.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Questions at a time.")]
EngineName = Annotated[Engine, typer.Option(help="ray: on the workers of a Ray cluster.")]
RayWorkers = Annotated[int, typer.Option(min=1, help="Of --engine ray, each with a model.")]


def answer(
    question_file: QuestionFile,
    answers_file: AnswersFile,
    image_folder: ImageFolder = Path("."),
    model: Model = None,
    method: MethodOrFile = "autoprune",
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "--target-token-num",
            help="Mean visual tokens per layer, or a share of them (1/9, 11%); default: 64, or "
            "what was tuned for.",
        ),
    ] = None,
    settings: Settings = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer at most.")] = 128,
    conv_mode: Annotated[
        str,
        typer.Option(
            help="Words around a question: template (the model's own), vicuna_v1 or llava_v1."
        ),
    ] = "template",
    llava_pictures: Annotated[
        bool,
        typer.Option("--llava-pictures", help="Pad pictures to a square and so on, as LLaVA does."),
    ] = False,
    single_pred_prompt: SinglePredPrompt = False,
    lang: Lang = "en",
    temperature: Temperature = 0.0,
    batch_size: BatchSize = 8,
    num_chunks: NumChunks = 1,
    chunk_idx: ChunkIdx = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="The first questions only.")] = None,
    engine: EngineName = Engine.local,
    workers: RayWorkers = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Answer a file of questions into a file of answers, as LLaVA's scripts have them."""
    from ..commands import answer as command
    from ..commands.inputs import build_method, parse_budget
    from ..evaluation.files import Asking
    from ..evaluation.files.prompts import conversation

    command.check_greedy(temperature)
    asked = None if budget is None else parse_budget(budget)
    asking = Asking(
        question_file,
        image_folder,
        build_method(method, asked, {}, settings or []),
        model=None if model == command.EMBEDDED else model,
        device=device,
        dtype=dtype,
        max_new_tokens=max_new_tokens,
        conversation=conversation(conv_mode),
        llava_pictures=llava_pictures,
        instruction=command.instruction(single_pred_prompt, lang),
        batch_size=batch_size,
        num_chunks=num_chunks,
        chunk_idx=chunk_idx,
        limit=limit,
    )
    command.answer(asking, answers_file, engine.value, workers, console())


def llava_eval(
    model_path: Annotated[
        str, typer.Option(help="Folder or hub name, or embedded for the embedded model.")
    ],
    question_file: QuestionFile,
    answers_file: AnswersFile,
    image_folder: ImageFolder = Path("."),
    model_base: Annotated[str | None, typer.Option(help="Not understood.")] = None,
    conv_mode: Annotated[str, typer.Option(help="vicuna_v1, llava_v1 or template.")] = "llava_v1",
    num_chunks: NumChunks = 1,
    chunk_idx: ChunkIdx = 0,
    temperature: Temperature = 0.0,
    top_p: Annotated[float | None, typer.Option("--top_p", help="Without effect.")] = None,
    num_beams: Annotated[int, typer.Option("--num_beams", help="1: answers are greedy.")] = 1,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max_new_tokens", min=1, help="Default: 128; with options to choose 1024."),
    ] = None,
    visual_token_num: Annotated[int | None, typer.Option(help="Without effect.")] = None,
    target_token_num: Annotated[int, typer.Option(help="Mean visual tokens leaving a layer.")] = 64,
    x0: Annotated[float, typer.Option("--x0", help="Midpoint of the curve, in layers.")] = 14.9,
    k0: Annotated[float, typer.Option("--k0", help="Slope without information.")] = 0.4,
    gamma: Annotated[float, typer.Option(help="How much one bit flattens it.")] = 0.2,
    single_pred_prompt: SinglePredPrompt = False,
    lang: Lang = "en",
    seed: Annotated[int, typer.Option(help="Without effect.")] = 0,
    batch_size: BatchSize = 8,
    engine: EngineName = Engine.local,
    workers: RayWorkers = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """The released AutoPrune with the flags of its scripts: model_vqa_loader, _science and _mmbench."""
    from ..commands import answer as command

    asking = command.asking_as_released(
        questions=question_file,
        images=image_folder,
        model_path=model_path,
        model_base=model_base,
        conv_mode=conv_mode,
        temperature=temperature,
        num_beams=num_beams,
        target_token_num=target_token_num,
        curve=(x0, k0, gamma),
        max_new_tokens=max_new_tokens,
        instruction=command.instruction(single_pred_prompt, lang),
        where=(device, dtype),
        part=(num_chunks, chunk_idx),
        batch_size=batch_size,
    )
    command.answer(asking, answers_file, engine.value, workers, console())


def score(
    format: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT",
            help="textvqa, vqav2, vizwiz, gqa, pope, mme, scienceqa or coco-caption.",
        ),
    ],
    answers_file: Annotated[
        Path, typer.Option(help="JSON lines with question_id, prompt and text, as LLaVA's.")
    ],
    annotations: Annotated[Path, typer.Option(help="The data set's own file or folder.")],
    question_file: Annotated[
        Path | None, typer.Option(help="LLaVA's questions; for pope's folder, and for vizwiz.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of scienceqa.")] = "test",
    against: Annotated[
        Path | None,
        typer.Option(help="Other answers, such as the unpruned model's: how often both agree."),
    ] = None,
    answered_only: Annotated[
        bool,
        typer.Option("--answered-only", help="Leave out questions that have no answer."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Score a file of answers by the data set's own formula."""
    from ..commands import score as command

    request = command.ScoreRequest(
        format=format,
        answers_file=answers_file,
        annotations=annotations,
        question_file=question_file,
        split=split,
        against=against,
        answered_only=answered_only,
        as_json=as_json,
    )
    command.score(request, console())
