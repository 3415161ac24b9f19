"""Requests that share a batch: each is answered as alone, and spends exactly its own budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from autoprune import AutoPrune, Budget, create
from autoprune.loading import Loaded
from autoprune.serving.generation import Row, generate
from autoprune.serving.job import Job
from autoprune.serving.service import Service

from .conftest import LAYERS, VISUAL, Told

MakeJob = Callable[..., tuple[Job, Told]]

MIXED: tuple[tuple[dict[str, Any], str, int], ...] = (
    ({"budget": 30}, "what shape is cyan?", 1),
    ({"budget": 72}, "how many rings are there in this picture, and where?", 1),
    ({"ratio": 0.25}, "what?", 2),
    ({"budget": 144}, "is there an orange ring?", 1),
    ({"method": "fastv", "budget": 60}, "name every digit", 1),
    ({}, "hello", 0),
)


def run(loaded: Loaded, jobs: Sequence[Job]) -> None:
    generate(loaded, [Row(job, loaded.processor.tokenizer, len(jobs)) for job in jobs])


def alone(loaded: Loaded, job: Job, method: Any, tokens: int) -> str:
    """The answer by the library itself: no part of the server but the prompt."""
    inputs = job.prompt.inputs
    with torch.inference_mode(), method(loaded.model):
        ids = loaded.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return str(loaded.processor.decode(new, skip_special_tokens=True)).lstrip()


def test_a_mixed_batch_answers_each_prompt_as_alone_and_spends_its_budget(
    loaded: Loaded, make_job: MakeJob
) -> None:
    made = [
        make_job(words, pictures, autoprune=pruning, max_tokens=8)
        for pruning, words, pictures in MIXED
    ]
    run(loaded, [job for job, _ in made])
    methods = (
        AutoPrune(30),
        AutoPrune(72),
        AutoPrune(Budget.ratio(0.25)),
        AutoPrune(144),
        create("fastv", 60),
        AutoPrune(36),
    )
    for (job, told), method in zip(made, methods, strict=True):
        assert told.text == alone(loaded, job, method, 8)
        assert told.finished.batch_size == len(MIXED)
    spent = [sum(told.finished.sample.tokens_per_layer) for _, told in made]
    assert spent[:4] == [30 * LAYERS, 72 * LAYERS, 2 * VISUAL * LAYERS // 4, 144 * LAYERS]
    # FastV cuts once, so it spends what its shape allows: never more.
    assert 0 < spent[4] <= 60 * LAYERS
    assert spent[5] == 0


def test_rows_end_at_their_own_number_of_tokens(loaded: Loaded, make_job: MakeJob) -> None:
    made = [make_job(max_tokens=count) for count in (1, 5, 3)]
    run(loaded, [job for job, _ in made])
    texts = [told.text for _, told in made]
    assert [told.finished.tokens for _, told in made] == [1, 5, 3]
    assert texts[1].startswith(texts[2]) and texts[2].startswith(texts[0])
    assert [told.finished.reason for _, told in made] == ["length"] * 3


def test_a_row_ends_before_its_stop_string(loaded: Loaded, make_job: MakeJob) -> None:
    job, told = make_job(max_tokens=8)
    run(loaded, [job])
    whole = told.text
    stop = whole[4:6]
    stopped, other = make_job(max_tokens=8, stop=[stop]), make_job(max_tokens=8)
    run(loaded, [stopped[0], other[0]])
    assert stopped[1].text == whole[: whole.find(stop)]
    assert stopped[1].finished.reason == "stop"
    assert other[1].text == whole


def test_seeds_draw_the_same_in_every_batch(loaded: Loaded, make_job: MakeJob) -> None:
    sampled = {"temperature": 1.5, "top_p": 0.9, "max_tokens": 8}
    first, same, other = (make_job(**sampled, seed=seed) for seed in (7, 7, 8))
    greedy = make_job(max_tokens=8)
    run(loaded, [first[0]])
    run(loaded, [greedy[0], other[0], same[0]])
    assert first[1].text == same[1].text
    assert first[1].text != other[1].text
    assert greedy[1].text == alone(loaded, greedy[0], AutoPrune(36), 8)


def test_sampling_draws_from_the_likeliest_tokens(loaded: Loaded, make_job: MakeJob) -> None:
    """By hand: of shares .5, .3, .15, .05, top_p=.6 leaves the first two, and temperature sharpens them."""
    scores = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    drawn = []
    job, _ = make_job("a", 0, temperature=1, top_p=0.6)
    for seed in range(400):
        job.seed = seed
        drawn.append(int(Row(job, loaded.processor.tokenizer, 1).choose(scores).argmax()))
    assert set(drawn) == {1, 3}
    # However near to 0: the likeliest, and no overflow.
    cold, _ = make_job("a", 0, temperature=5e-324)
    assert int(Row(cold, loaded.processor.tokenizer, 1).choose(scores).argmax()) == 1
    assert drawn.count(1) / 400 == pytest.approx(0.5 / 0.8, abs=0.08)


def test_logprobs_are_those_of_the_model(loaded: Loaded, make_job: MakeJob) -> None:
    job, told = make_job(logprobs=True, top_logprobs=3, max_tokens=2, autoprune={"ratio": 1})
    run(loaded, [job])
    with torch.inference_mode():
        logits = loaded.model(**job.prompt.inputs).logits[0, -1]
    expected = logits.log_softmax(-1).topk(3)
    first = next(entry for event in told.events[:-1] for entry in event.logprobs)
    tokens = [loaded.processor.tokenizer.decode([i]) for i in expected.indices.tolist()]
    assert [entry["token"] for entry in first["top_logprobs"]] == tokens
    assert first["logprob"] == pytest.approx(expected.values[0].item(), abs=1e-5)
    assert bytes(first["bytes"]).decode() == first["token"] == tokens[0]


def test_a_cancelled_row_ends_at_once_and_the_others_go_on(
    loaded: Loaded, make_job: MakeJob
) -> None:
    leaves, stays = make_job(max_tokens=100), make_job(max_tokens=5)
    leaves[0].tell = lambda event: leaves[0].cancel()
    row = Row(leaves[0], loaded.processor.tokenizer, 2)
    generate(loaded, [row, Row(stays[0], loaded.processor.tokenizer, 2)])
    assert row.tokens < 5
    assert stays[1].finished.tokens == 5


def test_what_breaks_a_batch_fails_alone(
    service: Service, loaded: Loaded, make_job: MakeJob
) -> None:
    jobs = [make_job(max_tokens=4) for _ in range(3)]
    broken = jobs[1][0].prompt.inputs
    broken["pixel_values"] = broken["pixel_values"][:0]
    service.engine._answer([job for job, _ in jobs])
    assert jobs[1][1].error.status in (400, 500)
    for job, told in (jobs[0], jobs[2]):
        assert told.text == alone(loaded, job, AutoPrune(36), 4)
        assert told.finished.batch_size == 1


def test_an_answer_that_cannot_be_written_fails_alone(
    service: Service, loaded: Loaded, make_job: MakeJob
) -> None:
    good, bad = make_job(max_tokens=4), make_job(max_tokens=4)
    rows = [Row(job, loaded.processor.tokenizer, 2) for job, _ in (good, bad)]
    rows[1]._text = None  # type: ignore[assignment]
    generate(loaded, rows)
    assert good[1].finished.tokens == 4
    assert bad[1].error.status == 500


def test_batches_take_only_what_goes_together(service: Service, make_job: MakeJob) -> None:
    engine = service.engine
    plain = make_job()[0]
    method = AutoPrune(36, positions="compacted")
    compacted = Job(plain.request, plain.prompt, "autoprune", method, 3, plain.tell)
    two = make_job(pictures=2, autoprune={"ratio": 0.5})[0]
    jobs = [make_job()[0], compacted, make_job(pictures=0)[0], two]
    engine._waiting.extend(jobs)
    assert engine._taken() == [jobs[0], jobs[2], jobs[3]]
    assert engine._taken() == [compacted]
    assert not engine._waiting
