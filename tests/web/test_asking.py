"""What the page asks the model, without a browser."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from autoprune import AutoPrune, Budget, tiny
from autoprune.engine.cache.argument import as_argument, cache_of
from autoprune.errors import UnsupportedError
from autoprune.loading import Loaded, load_embedded, prepare
from autoprune.web import conversation
from autoprune.web.asking import MAX_CHARACTERS, ask, build, compare
from autoprune.web.conversation import MAX_TURNS, Conversation, keep_recent


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load_embedded("cpu", "float32")


@pytest.fixture(scope="module")
def scene() -> tuple[Image.Image, str]:
    drawn = tiny.draw_scene(5, split="heldout")
    return drawn.image, tiny.ask(drawn, 5, ["count"])[0].text


def test_both_answers_are_those_of_the_library(loaded, scene):
    image, question = scene
    found = ask(loaded, image, question, build("autoprune", 25))
    assert found.full.text == tiny.answer(loaded.model, loaded.processor, image, question)
    with AutoPrune(Budget.ratio(0.25))(loaded.model) as trace:
        assert found.pruned.text == tiny.answer(loaded.model, loaded.processor, image, question)
    assert found.sample.tokens_per_layer == trace.samples[0].tokens_per_layer
    assert sum(found.sample.tokens_per_layer) == 36 * 16
    assert [view.tokens.size for view in found.views] == [144]


def test_a_summary_is_made_where_it_is_asked_for(loaded, scene):
    assert ask(loaded, *scene, build("divprune", 10, summary=True)).sample.summary_token is not None
    with pytest.raises(ValueError, match="tome merges dropped tokens by itself"):
        build("tome", 10, summary=True)


@pytest.mark.parametrize("percent", [0, -3, 101, float("nan")])
def test_a_share_that_is_none_is_refused(percent):
    with pytest.raises(ValueError, match="above 0 and up to 100"):
        build("autoprune", percent)


@pytest.mark.parametrize(
    ("question", "message"),
    [("  ", "the question is empty"), ("a" * (MAX_CHARACTERS + 1), "2001 characters")],
)
def test_a_question_that_is_none_is_refused(loaded, scene, question, message):
    with pytest.raises(ValueError, match=message):
        ask(loaded, scene[0], question, build("autoprune", 25))


def test_a_method_that_cannot_run_leaves_the_others_alone(loaded, scene):
    """1 % of 144 tokens is less than layer 0 alone costs AutoPrune."""
    methods = [build("autoprune", 1), build("divprune", 25)]
    full, (refused, (given, sample)), seen = compare(loaded, *scene, methods)
    assert isinstance(refused, str) and "smallest feasible budget" in refused
    assert (
        full.text,
        given.text,
        sample.tokens_per_layer,
    ) == (
        ask(loaded, *scene, methods[1]).full.text,
        ask(loaded, *scene, methods[1]).pruned.text,
        [36] * 16,
    )
    assert len(seen) == 1


def test_a_later_question_is_answered_on_the_pruned_cache(loaded, scene):
    image, question = scene
    talk = Conversation(image, build("autoprune", 25))
    first = talk.ask(loaded, question)
    second = talk.ask(loaded, "what color is the ring?")
    assert [turn.on_cache for turn in (first, second)] == [False, True]
    assert first.answer == ask(loaded, image, question, build("autoprune", 25)).pruned.text
    # The same by hand: prune once, then the words behind the answer.
    text = tiny.prompt(
        loaded.processor, "what color is the ring?", earlier_turns=((question, first.answer),)
    )
    whole = loaded.processor(images=image, text=text, return_tensors="pt")
    inputs = prepare(loaded, image, question)
    with build("autoprune", 25)(loaded.model), torch.inference_mode():
        out = loaded.model.generate(
            **inputs, max_new_tokens=64, do_sample=False, return_dict_in_generate=True
        )
        ids = loaded.model.generate(
            input_ids=whole.input_ids,
            attention_mask=whole.attention_mask,
            **as_argument(loaded.model, cache_of(out)),
            max_new_tokens=64,
            do_sample=False,
        )
    new = ids[:, whole.input_ids.shape[1] :]
    assert second.answer == loaded.processor.batch_decode(new, skip_special_tokens=True)[0].strip()
    assert talk.sample is not None and sum(talk.sample.tokens_per_layer) == 36 * 16


def test_a_conversation_reads_the_picture_again_where_its_template_does_not_go_on(
    loaded, scene, monkeypatch
):
    talk = Conversation(scene[0], build("autoprune", 25))
    talk.ask(loaded, scene[1])
    monkeypatch.setattr(talk, "_ids", talk._ids + 1)
    assert not talk.ask(loaded, scene[1]).on_cache
    assert len(talk.turns) == 2


def test_a_failed_question_is_no_turn(loaded, scene):
    talk = Conversation(scene[0], build("autoprune", 1))
    with pytest.raises((ValueError, UnsupportedError), match="smallest feasible budget"):
        talk.ask(loaded, scene[1])
    assert talk.turns == []


def test_a_question_that_breaks_off_leaves_no_half_answer_in_the_cache(loaded, scene, monkeypatch):
    """The whole conversation is read anew, as if the broken question had not been asked."""
    image, question = scene
    talk, other = (Conversation(image, build("autoprune", 25)) for _ in range(2))
    for one in (talk, other):
        one.ask(loaded, question)
    decode = loaded.model.lm_head.forward
    calls = iter(range(100))

    def broken(*given):
        if next(calls) == 1:
            raise RuntimeError("out of memory")
        return decode(*given)

    with monkeypatch.context() as patched:
        patched.setattr(loaded.model.lm_head, "forward", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            talk.ask(loaded, "what shape is the red object?")
    assert len(talk.turns) == 1
    turn = talk.ask(loaded, "what color is the ring?")
    assert not turn.on_cache
    monkeypatch.setattr(other, "_ids", None)
    assert turn.answer == other.ask(loaded, "what color is the ring?").answer


def test_only_the_latest_conversations_have_a_cache(loaded, scene, monkeypatch):
    monkeypatch.setattr(conversation, "MOST_CACHES", 2)
    recent: list = []
    first, second, third = (Conversation(scene[0], build("autoprune", 25)) for _ in range(3))
    for talk in (first, second, first, third):
        talk.ask(loaded, "what color is the ring?")
        keep_recent(recent, talk)
    assert [one() for one in recent] == [first, third]
    asked = [
        talk.ask(loaded, "what color is the ring?").on_cache for talk in (first, second, third)
    ]
    assert asked == [True, False, True]


def test_a_conversation_has_an_end(loaded, scene):
    talk = Conversation(scene[0], build("autoprune", 25))
    turn = talk.ask(loaded, scene[1])
    talk.turns = [turn] * MAX_TURNS
    with pytest.raises(ValueError, match=f"{MAX_TURNS} questions at most"):
        talk.ask(loaded, scene[1])
