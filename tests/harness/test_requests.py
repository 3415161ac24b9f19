"""Requests as the harness makes them, answered as the model answers by itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lmms_eval.api.instance import Instance
from PIL import Image

from autoprune import AutoPrune, tiny
from autoprune.evaluation.harness.model import AutoPruneChat, AutoPruneSimple
from autoprune.evaluation.harness.video import read_frames

BUDGET = 24
SCENES = [tiny.draw_scene(seed).image for seed in range(4)]
QUESTIONS = ["is there a red ring?", "what color is the circle?", "how many squares are there?"]
GREEDY = {"max_new_tokens": 8, "temperature": 0}


def chat(shown: Sequence[Any], text: str, options: dict[str, Any] = GREEDY, kind: str = "image"):
    """A request of a chat task about pictures or videos."""
    parts = [{"type": kind, "url": each} for each in shown]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    arguments = (text, lambda doc: messages, options, 0, "task", "test")
    return _instance("generate_until", arguments)


def _instance(kind: str, arguments: tuple[Any, ...]) -> Instance:
    about = {"task": "task", "doc_id": 0, "repeats": 1}
    return Instance(kind, arguments, 0, about)


def with_documents(model: AutoPruneChat) -> AutoPruneChat:
    model.task_dict = {"task": {"test": [{}]}}
    return model


@pytest.fixture(scope="module")
def pruned() -> AutoPruneChat:
    return with_documents(AutoPruneChat(method="autoprune", budget=BUDGET, batch_size=4))


@pytest.fixture(scope="module")
def simple() -> AutoPruneSimple:
    return with_documents(AutoPruneSimple(method="autoprune", budget=BUDGET, batch_size=4))


@pytest.fixture(scope="module")
def own() -> Any:
    return tiny.load()


def alone(own: Any, images: Sequence[Image.Image], text: str, method: Any = None, **options: Any):
    """What `generate` gives for one prompt, with scores."""
    model, processor = own
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(images=list(images) or None, text=prompt, return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False, **options}
    with torch.inference_mode(), (method or AutoPrune(BUDGET))(model):
        out = model.generate(**inputs, **options, output_scores=True, return_dict_in_generate=True)
    new = out.sequences[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new, skip_special_tokens=True).strip(), new, out.scores


def test_answers_come_in_the_order_of_the_requests_whatever_they_show(
    pruned: AutoPruneChat, own: Any
):
    # The longest texts are asked first, those with as many pictures together.
    shown = [SCENES[:1], SCENES[1:2], SCENES[2:3], SCENES[2:4], [], SCENES[:2]]
    texts = [QUESTIONS[i % 3] for i in range(len(shown))]
    found = pruned.generate_until(
        [chat(images, text) for images, text in zip(shown, texts, strict=True)]
    )
    expected = [alone(own, images, text)[0] for images, text in zip(shown, texts, strict=True)]
    assert [each.text for each in found] == expected


def test_the_older_kind_of_request_is_answered_alike(simple: AutoPruneSimple, own: Any):
    arguments = (QUESTIONS[1], GREEDY, lambda doc: SCENES[:1], 0, "task", "test")
    (found,) = simple.generate_until([_instance("generate_until", arguments)])
    assert found.text == alone(own, SCENES[:1], QUESTIONS[1])[0]


def test_an_answer_ends_where_the_task_ends_it(pruned: AutoPruneChat, own: Any):
    whole = alone(own, SCENES[:1], "describe the picture", max_new_tokens=24)[0]
    assert len(whole.split()) > 3
    end = f" {whole.split()[2]}"
    options = {"max_new_tokens": 24, "until": [end, "never"]}
    (short,) = pruned.generate_until([chat(SCENES[:1], "describe the picture", options)])
    assert short.text == whole[: whole.index(end)]
    (one,) = pruned.generate_until(
        [chat(SCENES[:1], "describe the picture", {"max_new_tokens": 1})]
    )
    assert one.token_counts.output_tokens == 1
    assert whole.startswith(one.text)


def test_beams_count_a_prompt_once(pruned: AutoPruneChat, own: Any):
    texts = ["is there a red ring?", "describe the picture", "how many red squares are there?"]
    prompts = list(zip(SCENES, texts, strict=False))
    beams, greedy = (
        pruned.generate_until(
            [chat([image], text, {**GREEDY, "num_beams": n}) for image, text in prompts]
        )
        for n in (2, 1)
    )
    assert [each.text for each in beams] == [
        alone(own, [image], text, num_beams=2)[0] for image, text in prompts
    ]
    counts = [each.token_counts.input_tokens for each in beams]
    assert counts == [each.token_counts.input_tokens for each in greedy]
    assert len(set(counts)) == 3


def test_a_likelihood_is_that_of_the_answer_behind_the_pruned_prompt(
    simple: AutoPruneSimple, own: Any
):
    """The greedy answer's tokens have the probabilities that `generate` gave them."""
    processor = own[1]
    asked, expected = [], []
    for image, text in zip(SCENES, [*QUESTIONS, QUESTIONS[0]], strict=True):
        answer, new, scores = alone(own, [image], text)
        # As the harness joins an answer to its question.
        answer = f" {answer}"
        words = processor.tokenizer(answer, add_special_tokens=False).input_ids
        assert new[: len(words)].tolist() == words
        logs = [float(s[0].log_softmax(-1)[t]) for s, t in zip(scores, words, strict=False)]
        expected.append(-sum(logs) / len(logs))
        asked.append((text, answer, lambda doc, image=image: [image], 0, "task", "test"))
    found = simple.loglikelihood([_instance("loglikelihood", each) for each in asked])
    assert [loss for loss, _ in found] == pytest.approx(expected, abs=1e-4)
    assert all(greedy for _, greedy in found)


def test_a_worse_answer_has_the_higher_loss(simple: AutoPruneSimple, own: Any):
    right = f" {alone(own, SCENES[:1], QUESTIONS[0])[0]}"
    wrong = {" yes": " no", " no": " yes"}[right]
    asked = [
        (QUESTIONS[0], lambda doc, text=text: text, lambda doc: SCENES[:1], 0, "task", "test")
        for text in (wrong, right)
    ]
    (bad, is_greedy), (good, _) = simple.loglikelihood(
        [_instance("loglikelihood", each) for each in asked]
    )
    assert bad > good
    assert not is_greedy


def test_without_pruning_a_likelihood_is_that_of_one_forward(own: Any):
    model, processor = own
    full = with_documents(AutoPruneSimple(method="full"))
    answer = " green square"
    arguments = (QUESTIONS[2], answer, lambda doc: SCENES[:1], 0, "task", "test")
    ((loss, _),) = full.loglikelihood([_instance("loglikelihood", arguments)])
    text = tiny.prompt(processor, QUESTIONS[2])
    whole = processor(images=SCENES[0], text=text + answer, return_tensors="pt")
    before = processor(images=SCENES[0], text=text, return_tensors="pt")["input_ids"].shape[1]
    with torch.inference_mode():
        logs = model(**whole).logits[0].log_softmax(-1)
    ids = whole["input_ids"][0]
    each = [float(logs[i - 1, ids[i]]) for i in range(before, len(ids))]
    assert loss == pytest.approx(-sum(each) / len(each), abs=1e-4)


def test_each_round_asks_with_the_answers_before_it(pruned: AutoPruneChat, own: Any):
    heard = []

    def messages(doc: Any, round_idx: int | None = None, **before: Any) -> Any:
        text = QUESTIONS[round_idx or 0]
        shown = [{"type": "image", "url": SCENES[0]}, {"type": "text", "text": text}]
        said = [{"role": "user", "content": shown}]
        if round_idx is None:
            return said
        heard.append((round_idx, before["previous_output"], before["previous_round_info"]))
        return said, round_idx == 2, None, f"after {round_idx}"

    arguments = ("", messages, GREEDY, 0, "task", "test")
    (found,) = pruned.generate_until_multi_round(
        [_instance("generate_until_multi_round", arguments)]
    )
    first, second = (alone(own, SCENES[:1], text)[0] for text in QUESTIONS[:2])
    assert found == [first, second]
    assert heard == [(1, [first], None), (2, [first, second], "after 1")]


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten grey frames, the n-th of brightness 20 n, two a second."""
    import av

    path = tmp_path_factory.mktemp("film") / "film.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=2)
        stream.width = stream.height = 48
        for n in range(10):
            picture = Image.new("RGB", (48, 48), (20 * n,) * 3)
            for packet in stream.encode(av.VideoFrame.from_image(picture)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def brightness(frames: Sequence[Image.Image]) -> list[int]:
    return [round(frame.getpixel((24, 24))[0] / 20) for frame in frames]


def test_frames_are_spread_over_the_video(film: Path):
    assert brightness(read_frames(film, 4)) == [0, 3, 6, 9]
    assert brightness(read_frames(film, 99)) == list(range(10))
    assert brightness(read_frames(film, 2, start=1.0, end=3.0)) == [2, 6]
    with pytest.raises(ValueError, match="no frame between"):
        read_frames(film, 2, start=60.0)


def test_frames_are_pictures_to_a_model_without_videos(film: Path, own: Any):
    model = with_documents(AutoPruneChat(budget=BUDGET, max_frames=2))
    (found,) = model.generate_until([chat([str(film)], QUESTIONS[0], kind="video")])
    assert found.text == alone(own, read_frames(film, 2), QUESTIONS[0])[0]


def test_a_video_that_cannot_be_read_is_named(pruned: AutoPruneChat, tmp_path: Path):
    with pytest.raises(ValueError, match="there is no video file"):
        pruned.generate_until([chat(["gone.mp4"], "what?", kind="video")])
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"broken\.mp4.*cannot be decoded"):
        pruned.generate_until([chat([str(broken)], "what?", kind="video")])
    with pytest.raises(ValueError, match="asks about audio"):
        pruned.generate_until([chat(["a.wav"], "what?", kind="audio")])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"k9": 1}, "no option 'k9'; it has .*k0.*--model_args takes pretrained, method, budget"),
        ({"method": "fastv", "k0": 1}, "fastv has no option 'k0'"),
        ({"method": "fast"}, "there is no method 'fast'"),
        ({"method": "full", "budget": 64}, "takes no 'budget'"),
        ({"budget": "many"}, "budget 'many': expected a number of tokens"),
        ({"k0": "steep"}, "option k0 expects a number"),
        ({"batch_size": "auto"}, "batch_size must be a whole number above 0, got 'auto'"),
        ({"costs": "/nowhere/costs.jsonl"}, "there is no folder '/nowhere'; create it first"),
        ({"pretrained": "/nowhere"}, "there is no model folder '/nowhere'"),
    ],
)
def test_what_is_not_known_is_refused_in_a_sentence(arguments: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        AutoPruneChat(**arguments)


def test_why_a_method_cannot_run_is_left_beside_the_costs(tmp_path: Path):
    costs = tmp_path / "costs.jsonl"
    model = with_documents(AutoPruneChat(method="autoprune", budget=1, costs=str(costs)))
    with pytest.raises(ValueError, match="smallest"):
        model.generate_until([chat(SCENES[:1], QUESTIONS[0])])
    assert "smallest" in (tmp_path / "costs.jsonl.refused").read_text()


def test_a_tuned_file_is_a_method(tmp_path: Path, own: Any):
    from autoprune.methods.tuned_file import ModelIdentity, TunedFile, settings_of

    method = AutoPrune(budget=24, k0=0.8)
    path = tmp_path / "tuned.json"
    identity = ModelIdentity.of(own[0], "embedded")
    TunedFile("autoprune", method.budget, settings_of(method), identity, {}, {}, "0").write(path)
    costs = tmp_path / "costs.jsonl"
    model = with_documents(AutoPruneChat(method=str(path), costs=str(costs)))
    model.generate_until([chat(SCENES[:1], QUESTIONS[0])])
    assert json.loads(costs.read_text())["entering"] == 24
