"""The families of models the library is tested with, and what is checked of each: the one source of
`autoprune families`, of the README's table and of the engine's warning about other families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
    core: only the core of the checks is run on it: the oracle on two batches, budgets, vision scores.
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
    core: bool = False
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
DEEPSTACK = "deepstack features are cut too"
THINKER = "give the part that answers: model.thinker"
LATENT = "caches latents instead of keys and values"
HYBRID = "ranked before the decoder and behind layers that attend (docs/models.md)"
GLM_FLASH = "GLM-4.6V-Flash is of type glm4v"
RESAMPLED = "a resampler mixes all patches"
SLIDING = "no static cache, because of sliding layers"
SHARED_KEYS = f"dropped from the keys that layers share, too; {SLIDING}"

FULLY_TRIED = (
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
        note=DEEPSTACK,
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

CORE_FAMILIES = tuple(
    replace(family, core=True)
    for family in (
        Family(
            "qwen3_vl_moe",
            "Qwen3-VL-MoE",
            "Qwen/Qwen3-VL-30B-A3B-Instruct",
            "received",
            video=True,
            note=DEEPSTACK,
        ),
        Family("glm4v_moe", "GLM-4.5V", "zai-org/GLM-4.5V", "received", video=True),
        Family("glm46v", "GLM-4.6V", "zai-org/GLM-4.6V", "received", video=True, note=GLM_FLASH),
        Family("glm_ocr", "GLM-OCR", "zai-org/GLM-OCR", "received", video=True),
        Family(
            "qwen2_5_omni_thinker",
            "Qwen2.5-Omni thinker",
            "Qwen/Qwen2.5-Omni-7B",
            "received",
            video=True,
            note=THINKER,
        ),
        Family(
            "qwen3_omni_moe_thinker",
            "Qwen3-Omni thinker",
            "Qwen/Qwen3-Omni-30B-A3B-Instruct",
            "received",
            video=True,
            note=f"{THINKER}; {DEEPSTACK}",
        ),
        Family("paddleocr_vl", "PaddleOCR-VL", "PaddlePaddle/PaddleOCR-VL", "received"),
        Family("video_llama_3", "VideoLLaMA3", "lkhl/VideoLLaMA3-2B-Image-HF", "received"),
        Family("cosmos3_edge", "Cosmos 3 Edge", "nvidia/Cosmos3-Edge", "received"),
        Family("kimi_k25", "Kimi K2.5", "moonshotai/Kimi-K2.6", "received", note=LATENT),
        Family(
            "cohere2_vision",
            "Command A Vision",
            "CohereLabs/command-a-vision-07-2025",
            "received",
            note=SLIDING,
        ),
        Family("ovis2", "Ovis2", "thisisiron/Ovis2-2B-hf", "received"),
        Family("lighton_ocr", "LightOnOCR", "lightonai/LightOnOCR-1B-1025", "received"),
        Family(
            "mistral4",
            "Mistral Small 4",
            "mistralai/Mistral-Small-4-119B-2603",
            "received",
            note=LATENT,
            type_name="mistral3",
        ),
        Family("qwen3_5", "Qwen3.5", "Qwen/Qwen3.5-27B", "received", video=True, note=HYBRID),
        Family(
            "qwen3_5_moe",
            "Qwen3.5-MoE",
            "Qwen/Qwen3.5-35B-A3B",
            "received",
            video=True,
            note=HYBRID,
        ),
        Family("lfm2_vl", "LFM2-VL", "LiquidAI/LFM2-VL-1.6B", "received", note=HYBRID),
        Family("idefics2", "Idefics2", "HuggingFaceM4/idefics2-8b", None, note=RESAMPLED),
        Family(
            "vipllava",
            "ViP-LLaVA",
            "llava-hf/vip-llava-7b-hf",
            None,
            note="features of several blocks",
        ),
        Family(
            "video_llava",
            "Video-LLaVA",
            "LanguageBind/Video-LLaVA-7B-hf",
            "cls",
            note="tried with pictures",
        ),
        Family(
            "deepseek_vl", "DeepSeek-VL", "deepseek-community/deepseek-vl-1.3b-chat", "received"
        ),
        Family("janus", "Janus", "deepseek-community/Janus-Pro-1B", "received"),
        Family("aria", "Aria", "rhymes-ai/Aria", None, note=RESAMPLED),
        Family(
            "got_ocr2",
            "GOT-OCR 2.0",
            "stepfun-ai/GOT-OCR-2.0-hf",
            None,
            backends=("eager",),
            note="convolutions join patches",
        ),
        Family("molmo2", "Molmo 2", "allenai/Molmo2-8B", "received"),
        Family(
            "gemma4",
            "Gemma 4 E2B, E4B",
            "google/gemma-4-E4B-it",
            "received",
            video=True,
            note=SHARED_KEYS,
        ),
        Family(
            "gemma4_moe",
            "Gemma 4 26B-A4B, 31B",
            "google/gemma-4-26B-A4B-it",
            "received",
            video=True,
            note=SLIDING,
            type_name="gemma4",
        ),
        Family(
            "llama4",
            "Llama 4",
            "meta-llama/Llama-4-Scout-17B-16E-Instruct",
            "cls",
            note=f"{SLIDING}; transformers 5.24 needs two lines of yours (docs/models.md)",
        ),
    )
)
FAMILIES = (*FULLY_TRIED, *CORE_FAMILIES)

MODEL_TYPES = frozenset(family.model_type for family in FAMILIES)

CHECKS = (
    Check(
        "oracle",
        "prefill and 3 decode steps equal a slow model that masks tokens instead of cutting them, to "
        "2e-4 in float32 where pruning changes logits by more than 1: alone, in a left-padded batch "
        "of 3, and in one with a prompt without a picture (families tried in the core: in these two "
        "batches, in one with each attention)",
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
        lambda family: not family.core,
    ),
    Check(
        "text attention",
        "the attention that methods see is the model's own",
        lambda family: not family.core,
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
