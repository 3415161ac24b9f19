"""The families of models the library is tested with, and the tests behind each: the one source of
`autoprune families`, of the README's table and of the engine's warning about other families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SDPA_EAGER = ("sdpa", "eager")
WITH_FLASH = (*SDPA_EAGER, "flash")
WITH_FLEX = (*WITH_FLASH, "flex")
SCORES = {"cls": "CLS attention", "received": "attention received", None: "none"}


@dataclass(frozen=True)
class Family:
    """One tested family.

    name: what the tests call it: the model type, except where two families share one.
    title: what its authors call it.
    checkpoint: a model of it on the Hugging Face hub, to try; the tests use tiny random ones.
    vision: what the vision tower's scores are: "cls" (attention of its CLS token to a patch),
        "received" (attention a patch gets from the others), or None: methods then rank by the text's
        attention alone.
    video: whether its prompts may hold videos.
    backends: attention implementations of the decoder that are compared with the oracle; the kernels
        of "flash" and "flex" are stood in for on the CPU.
    every_mode: every way of generating is tried on it; on the others, greedy search and forwards.
    note: what is special about it.
    type_name: `config.model_type`, where it differs from `name`.
    """

    name: str
    title: str
    checkpoint: str
    vision: str | None
    video: bool = False
    backends: tuple[str, ...] = SDPA_EAGER
    every_mode: bool = False
    note: str = ""
    type_name: str | None = None

    @property
    def model_type(self) -> str:
        return self.type_name or self.name

    @property
    def media(self) -> tuple[str, ...]:
        return ("image", "video") if self.video else ("image",)


@dataclass(frozen=True)
class Check:
    """A test, what it shows, and of which families.

    test: file, or file::function.
    """

    name: str
    shows: str
    test: str
    covers: Callable[[Family], bool] = lambda family: True


NEWLINES = "a picture's line breaks have no vision score"
SLIDING = "no static cache, because of sliding layers"

FAMILIES = (
    Family(
        "llava", "LLaVA", "llava-hf/llava-1.5-7b-hf", "cls", backends=WITH_FLEX, every_mode=True
    ),
    Family("llava_next", "LLaVA-NeXT", "llava-hf/llava-v1.6-mistral-7b-hf", "cls", note=NEWLINES),
    Family(
        "llava_next_video",
        "LLaVA-NeXT-Video",
        "llava-hf/LLaVA-NeXT-Video-7B-hf",
        "cls",
        video=True,
        note=NEWLINES,
    ),
    Family(
        "llava_onevision",
        "LLaVA-OneVision",
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "received",
        video=True,
        note=NEWLINES,
    ),
    Family("qwen2_vl", "Qwen2-VL", "Qwen/Qwen2-VL-7B-Instruct", "received", video=True),
    Family(
        "qwen2_5_vl",
        "Qwen2.5-VL",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "received",
        video=True,
        backends=WITH_FLEX,
        every_mode=True,
        note="scored in the last block with full attention",
    ),
    Family(
        "qwen3_vl",
        "Qwen3-VL",
        "Qwen/Qwen3-VL-8B-Instruct",
        "received",
        video=True,
        backends=WITH_FLASH,
        note="deepstack features are cut too",
    ),
    Family(
        "glm4v",
        "GLM-4V",
        "zai-org/GLM-4.1V-9B-Thinking",
        "received",
        video=True,
        backends=WITH_FLASH,
    ),
    Family("internvl", "InternVL", "OpenGVLab/InternVL3-8B-hf", "cls", backends=WITH_FLASH),
    Family("idefics3", "Idefics3", "HuggingFaceM4/Idefics3-8B-Llama3", "received"),
    Family("smolvlm", "SmolVLM", "HuggingFaceTB/SmolVLM2-2.2B-Instruct", "received"),
    Family("mistral3", "Mistral 3", "mistralai/Mistral-Small-3.1-24B-Instruct-2503", "received"),
    Family("aya_vision", "Aya Vision", "CohereLabs/aya-vision-8b", "received", note=SLIDING),
    Family("gemma3", "Gemma 3", "google/gemma-3-4b-it", "received", note=SLIDING),
    Family(
        "paligemma", "PaliGemma", "google/paligemma-3b-mix-224", "received", backends=WITH_FLASH
    ),
    Family(
        "paligemma2",
        "PaliGemma 2",
        "google/paligemma2-3b-mix-224",
        "received",
        backends=("eager",),
        note=f"{SLIDING}; no sdpa in transformers",
        type_name="paligemma",
    ),
)

MODEL_TYPES = frozenset(family.model_type for family in FAMILIES)

_EQUALITY = "tests/engine/test_oracle_equality.py"
_VISION = "tests/engine/test_vision_scores.py"

CHECKS = (
    Check(
        "oracle",
        "prefill and 3 decode steps equal a slow model that masks tokens instead of cutting them, to "
        "2e-4 in float32 where pruning changes logits by more than 1: alone, in a left-padded batch "
        "of 3, and in one with a prompt without a picture",
        f"{_EQUALITY}::test_pruning_equals_the_oracle",
    ),
    Check(
        "nothing pruned",
        "a budget of everything leaves the logits bit-equal",
        f"{_EQUALITY}::test_a_budget_of_everything_is_the_plain_model_bit_for_bit",
    ),
    Check(
        "budget",
        "each prompt of a batch spends its budget exactly",
        f"{_EQUALITY}::test_the_trace_says_what_the_prompts_hold_and_spends_the_budget",
    ),
    Check(
        "batches",
        "a prompt gets in a batch what it gets alone",
        f"{_EQUALITY}::test_a_prompt_gets_in_a_batch_what_it_gets_alone",
    ),
    Check(
        "padding",
        "plain forwards with left and with right padding equal the oracle in every row",
        f"{_EQUALITY}::test_a_plain_forward_returns_the_oracles_rows_in_their_places",
    ),
    Check(
        "text attention",
        "the attention that methods see is the model's own",
        "tests/engine/test_observations.py::test_attention_is_the_models_own",
    ),
    Check(
        "vision scores",
        "a patch scores exactly the visual tokens that change when it is disturbed",
        f"{_VISION}::test_a_patch_scores_exactly_the_tokens_it_makes",
        lambda family: family.vision is not None,
    ),
    Check(
        "generation",
        "sampling, beams, prompt lookup, static cache, no cache, a second turn and labels equal the "
        "oracle",
        "tests/engine/test_generation.py",
        lambda family: family.every_mode,
    ),
    Check(
        "flash",
        "prefill and 3 decode steps equal the oracle, with transformers' code for flash attention 2 "
        "around stand-ins for its kernels",
        "tests/engine/test_backends.py::test_flash_attention_equals_the_oracle",
        lambda family: "flash" in family.backends,
    ),
    Check(
        "flex",
        "the same for flex attention, computed by its plain formula",
        "tests/engine/test_backends.py::test_flex_attention_equals_the_oracle",
        lambda family: "flex" in family.backends,
    ),
)


def describe(family: Family) -> dict[str, Any]:
    """A row as a record for JSON, with the checks that stand behind it."""
    return {
        "name": family.name,
        "title": family.title,
        "model_type": family.model_type,
        "checkpoint": family.checkpoint,
        "media": list(family.media),
        "vision_scores": SCORES[family.vision],
        "backends": list(family.backends),
        "generation": generation(family),
        "note": family.note,
        "checks": {check.name: check.test for check in CHECKS if check.covers(family)},
    }


def generation(family: Family) -> str:
    """The ways of generating that are tried on this very family."""
    return "every mode" if family.every_mode else "greedy"


def rows() -> list[tuple[str, ...]]:
    """The table for readers: a heading, then one row per family."""
    table: list[tuple[str, ...]] = [
        (
            "family",
            "model type",
            "for example",
            "prompts",
            "vision scores",
            "attention tried",
            "generation tried",
            "note",
        )
    ]
    for family in FAMILIES:
        media = "images, video" if family.video else "images"
        table.append(
            (
                family.title,
                family.model_type,
                family.checkpoint,
                media,
                SCORES[family.vision],
                ", ".join(family.backends),
                generation(family),
                family.note,
            )
        )
    return table


def checks() -> list[str]:
    """A sentence for each check: what it shows, and of which families."""
    return [f"{check.name}: {check.shows} ({_scope(check)})" for check in CHECKS]


def markdown() -> str:
    """The table and its checks as the README shows them."""
    heading, *body = rows()
    table = [heading, tuple("---" for _ in heading), *body]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    listed = [
        f"* {check.name}: {check.shows} ({_scope(check)}, [test]({check.test.split('::')[0]}))"
        for check in CHECKS
    ]
    return "\n".join([*lines, "", "What is checked, on tiny random models:", "", *listed])


def _scope(check: Check) -> str:
    covered = [family.title for family in FAMILIES if check.covers(family)]
    return "every family" if len(covered) == len(FAMILIES) else ", ".join(covered)
