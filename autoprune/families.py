"""The families of models the library is tested with, and what is checked of each: the one source of
`autoprune families`, of the README's table and of the engine's warning about other families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    """Something that is tested, what it shows, and of which families."""

    name: str
    shows: str
    covers: Callable[[Family], bool] = lambda family: True


NEWLINES = "a picture's line breaks have no vision score"
ADAPTER = "to be converted; an adapter mixes the patches of a picture, so these have no tokens"
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
    Family(
        "cogvlm",
        "CogVLM",
        "zai-org/cogvlm-chat-hf",
        "cls",
        note="converted first (docs/cogvlm.md); no compacted positions",
    ),
    Family("senna", "Senna", "rb93dett/Senna", None, note=ADAPTER),
)

MODEL_TYPES = frozenset(family.model_type for family in FAMILIES)

CHECKS = (
    Check(
        "oracle",
        "prefill and 3 decode steps equal a slow model that masks tokens instead of cutting them, to "
        "2e-4 in float32 where pruning changes logits by more than 1: alone, in a left-padded batch "
        "of 3, and in one with a prompt without a picture",
    ),
    Check(
        "nothing pruned",
        "a budget of everything leaves the logits bit-equal",
    ),
    Check(
        "budget",
        "each prompt of a batch spends its budget exactly",
    ),
    Check(
        "batches",
        "a prompt gets in a batch what it gets alone",
    ),
    Check(
        "padding",
        "plain forwards with left and with right padding equal the oracle in every row",
    ),
    Check(
        "text attention",
        "the attention that methods see is the model's own",
    ),
    Check(
        "vision scores",
        "a patch scores exactly the visual tokens that change when it is disturbed",
        lambda family: family.vision is not None,
    ),
    Check(
        "generation",
        "sampling, beams, prompt lookup, static cache, no cache, a second turn and labels equal the "
        "oracle",
        lambda family: family.every_mode,
    ),
    Check(
        "flash",
        "prefill and 3 decode steps equal the oracle, with transformers' code for flash attention 2 "
        "around stand-ins for its kernels",
        lambda family: "flash" in family.backends,
    ),
    Check(
        "flex",
        "the same for flex attention, computed by its plain formula",
        lambda family: "flex" in family.backends,
    ),
)
