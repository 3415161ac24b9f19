"""What a caller passes by mistake is one sentence, when it is passed."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers

import autoprune
from autoprune import AutoPrune, Budget
from autoprune import tiny as embedded
from tests import zoo

METHOD = AutoPrune(Budget.ratio(0.5))
model_of = functools.cache(zoo.build)


@pytest.fixture(scope="module")
def pipeline():
    model, processor = embedded.load()
    return transformers.pipeline("image-text-to-text", model=model, processor=processor)


@pytest.mark.parametrize("name", autoprune.list_methods())
def test_a_model_where_the_budget_belongs(name):
    with pytest.raises(ValueError, match="budget first") as caught:
        autoprune.create(name, model_of("llava"))
    assert str(caught.value) == (
        "a method takes its budget first and the model afterwards, got LlavaForConditionalGeneration as the "
        "budget; write AutoPrune(budget=64)(model)"
    )


def test_a_pipeline_where_the_budget_belongs(pipeline):
    with pytest.raises(ValueError, match=r"got ImageTextToTextPipeline as the budget; write Auto"):
        AutoPrune(pipeline)


def test_what_is_no_budget_is_shown_in_short():
    with pytest.raises(ValueError, match="expects a number, got") as caught:
        AutoPrune(list(range(10_000)))
    assert len(str(caught.value)) < 120


def test_a_pipeline_is_pruned_by_its_model(pipeline):
    scene = embedded.draw_scene(seed=7)
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": scene.image},
                {"type": "text", "text": embedded.ask(scene, 0, ["count"])[0].text},
            ],
        }
    ]
    answers = []
    for given in (pipeline, pipeline.model):
        with AutoPrune(16)(given) as trace:
            answers.append(pipeline(text=chat, max_new_tokens=4, do_sample=False))
        assert trace.samples[0].mean_tokens == 16
    assert answers[0] == answers[1]
    handle = AutoPrune(16).attach(pipeline)
    handle.detach()
    assert handle.model is pipeline.model


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        ("visual", r"got 'visual' of type str"),
        ([[True], [True, False]], r"got \[\[True\], \[True, False\]\] of type list"),
        (object, r"of type type"),
        (True, r"got shape \[\]"),
        ([], r"got shape \[0\]"),
        (torch.ones(1, 2, 3, dtype=torch.bool), r"got shape \[1, 2, 3\]"),
        (
            torch.rand(2, 5),
            "got torch.float32 with other values than 0 and 1; make it one, such as",
        ),
        (torch.arange(5), "got torch.int64 with other values than 0 and 1"),
    ],
)
def test_a_mask_that_is_none_is_refused_when_it_is_passed(mask, got):
    with pytest.raises(ValueError, match=got) as caught:
        METHOD(model_of("llava"), visual_mask=mask)
    assert str(caught.value).startswith("visual_mask must be bool [batch, length]")


@pytest.mark.parametrize(
    ("scores", "got"),
    [
        ("x", r"got 'x' of type str"),
        ([[0.5], [0.5, 0.5]], "of type list"),
        ({"scores": [1.0]}, "of type dict"),
        (0.5, r"got shape \[\]"),
        ([], r"got shape \[0\]"),
        (torch.rand(1, 2, 3), r"got shape \[1, 2, 3\]"),
        (torch.ones(16, dtype=torch.bool), "got torch.bool"),
        (torch.ones(16, dtype=torch.complex64), "got torch.complex64"),
    ],
)
def test_scores_that_are_none_are_refused_when_they_are_passed(scores, got):
    with pytest.raises(ValueError, match=got) as caught:
        METHOD(model_of("llava"), vision_scores=scores)
    assert str(caught.value).startswith("vision_scores must be float [batch, N]")


@pytest.mark.parametrize("scores", [[float("nan")] * 16, [-1.0] * 16, [float("inf")] * 16])
def test_scores_that_are_no_shares_are_refused_when_they_are_passed(scores):
    with pytest.raises(ValueError, match="must be finite and 0 or more"):
        METHOD(model_of("llava"), vision_scores=scores)


def test_lists_and_arrays_are_as_good_as_tensors():
    model = model_of("llava")
    inputs = zoo.inputs("llava", model)
    visual = zoo.visual_mask(model, inputs["input_ids"])
    scores = torch.rand(16, generator=torch.Generator().manual_seed(0))
    kept = []
    for mask, given in (
        (visual, scores),
        (visual.tolist(), scores.tolist()),
        (visual[0].int().numpy(), scores.double().numpy()[None]),
    ):
        with METHOD(model, visual_mask=mask, vision_scores=given) as trace, torch.no_grad():
            model(**inputs)
        kept.append([layer.tolist() for layer in trace.samples[0].kept])
    assert kept[0] == kept[1] == kept[2]
    assert len(kept[0][1]) < 16


@pytest.mark.parametrize("merger", [["dpc_knn"], 3, {"dpc_knn": 1}])
def test_a_merger_that_is_no_name(merger):
    with pytest.raises(ValueError, match="merger must be None, dpc_knn, summary or a SummaryToken"):
        AutoPrune(16, merger=merger)
