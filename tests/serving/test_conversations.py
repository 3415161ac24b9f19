"""A further question that goes on with the pruned cache of the answer before it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import DynamicCache

from autoprune import AutoPrune, UnsupportedError, tiny
from autoprune.engine.cache.argument import as_argument
from autoprune.loading import Loaded
from autoprune.serving.conversations import check_model
from autoprune.serving.job import Job
from autoprune.serving.service import Options, Service

from .conftest import LIMITS, Told, data_uri, picture, text

QUESTIONS = ("what shape is cyan?", "how many crosses are there?")


@pytest.fixture(scope="module")
def trained() -> Loaded:
    """The embedded model: its answers are made of whole words, which come back as they went out."""
    return Loaded(*tiny.load(), "embedded")


@pytest.fixture
def service(trained: Loaded) -> Service:
    options = Options(limits=LIMITS, conversations=2)
    return Service(trained, {"autoprune": AutoPrune(36)}, options)


def messages(image: Image.Image, *turns: str) -> list[dict[str, Any]]:
    """Questions and answers in turns; the first question is about the picture."""
    first = {"role": "user", "content": [picture(data_uri(image)), text(turns[0])]}
    later = [
        {"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)
    ]
    return [first, *later[1:]]


def ask(service: Service, said: list[dict[str, Any]], **fields: Any) -> tuple[Job, Told]:
    told = Told()
    body = {"messages": said, "max_tokens": 6, **fields}
    job = service.job(json.dumps(body).encode(), told.events.append)
    service.engine._answer([job])
    return job, told


def later_turn(trained: Loaded, first: Job, second: Job) -> str:
    """By the library alone: both questions on one cache."""
    cache = DynamicCache()
    with torch.inference_mode(), AutoPrune(36)(trained.model):
        given = {**as_argument(trained.model, cache), "do_sample": False, "max_new_tokens": 6}
        trained.model.generate(**first.prompt.inputs, **given)
        ids = second.prompt.inputs["input_ids"]
        whole = trained.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given)
    new = whole[0, ids.shape[1] :]
    return str(trained.processor.decode(new, skip_special_tokens=True)).lstrip()


def test_a_further_question_reads_its_own_words_alone(
    service: Service, trained: Loaded, scene: Image.Image
) -> None:
    first, told = ask(service, messages(scene, QUESTIONS[0]))
    assert first.cached_tokens == 0
    second, again = ask(service, messages(scene, QUESTIONS[0], told.text, QUESTIONS[1]))
    assert second.cached_tokens == first.prompt.length + told.finished.tokens - 1
    assert again.text == later_turn(trained, first, second)
    assert again.finished.sample is told.finished.sample
    third, _ = ask(
        service, messages(scene, QUESTIONS[0], told.text, QUESTIONS[1], again.text, "what?")
    )
    assert third.cached_tokens == second.prompt.length + again.finished.tokens - 1


def test_what_is_not_the_same_conversation_is_read_anew(
    service: Service, scene: Image.Image
) -> None:
    _, told = ask(service, messages(scene, QUESTIONS[0]))
    goes_on = messages(scene, QUESTIONS[0], told.text, QUESTIONS[1])
    other_picture = messages(tiny.draw_scene(4).image, QUESTIONS[0], told.text, QUESTIONS[1])
    other_answer = messages(scene, QUESTIONS[0], "never", QUESTIONS[1])
    for said, fields in (
        (other_picture, {}),
        (other_answer, {}),
        (goes_on, {"autoprune": {"budget": 40}}),
        (messages(scene, QUESTIONS[0]), {}),
    ):
        assert ask(service, said, **fields)[0].cached_tokens == 0


def test_only_the_last_ones_are_kept(service: Service, scene: Image.Image) -> None:
    _, told = ask(service, messages(scene, QUESTIONS[0]))
    goes_on = messages(scene, QUESTIONS[0], told.text, QUESTIONS[1])
    for words in ("one", "two"):
        ask(service, messages(scene, words))
    assert ask(service, goes_on)[0].cached_tokens == 0


def test_a_model_that_keeps_positions_is_refused() -> None:
    model = torch.nn.Module()
    model.rope_deltas = None
    with pytest.raises(UnsupportedError, match="leave --conversations out"):
        check_model(model)
