"""The embedded model, as a server is started: its method and budget come with the override."""

from __future__ import annotations

import pytest
from equality import NEW_TOKENS, Ask, Reference, answers, generate

from autoprune import tiny
from autoprune_vllm import overrides


@pytest.fixture(scope="module")
def reference():
    return Reference(tiny.path())


@pytest.fixture(scope="module")
def asks(reference):
    """Questions about scenes, by budget."""

    def of(budget):
        made = []
        for seed in range(4):
            scene = tiny.draw_scene(seed=seed)
            made += [
                Ask(reference.text(question.text), [scene.image], budget)
                for question in tiny.ask(scene, seed)[:3]
            ]
        return made

    return of


def test_text_alone_is_answered_as_ever(reference, start_engine):
    settings = overrides(str(tiny.path()), "divprune", 64)
    engine = start_engine(tiny.path(), hf_overrides=settings, num_gpu_blocks_override=40)
    text = reference.text("what color is the circle ?", pictures=0)
    ids = reference.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")
    told = reference.model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert answers(engine, [Ask(text)]) == [told[0, ids["input_ids"].shape[1] :].tolist()]


@pytest.mark.parametrize("options", [{}, {"positions": "compacted"}], ids=["original", "compacted"])
def test_the_servers_budget_holds_where_a_request_gives_none(
    options, reference, asks, start_engine
):
    settings = overrides(str(tiny.path()), "scope", 64, options={"alpha": 0.5, **options})
    engine = start_engine(tiny.path(), hf_overrides=settings, num_gpu_blocks_override=40)
    assert engine.llm_engine.model_config.uses_mrope == (not options)
    for budget in (None, 16, 144):
        spent = asks(64 if budget is None else budget)
        want = [reference.answer(ask, "scope", alpha=0.5, **options) for ask in spent]
        assert answers(engine, asks(budget)) == want
    (output,) = generate(engine, asks(None)[:1])
    (whole,) = generate(engine, asks(144)[:1])
    assert len(whole.prompt_token_ids) - len(output.prompt_token_ids) == 144 - 64
