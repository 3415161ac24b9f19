"""Asking vLLM and transformers the same, and an engine that is started once for many methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm import LLM, SamplingParams

import autoprune

NEW_TOKENS = 12


@dataclass
class Ask:
    """A prompt, the budget of its pictures (None asks for nothing), and how long the answer is."""

    text: str
    pictures: list[Image.Image] = field(default_factory=list)
    budget: int | None = None
    new_tokens: int = NEW_TOKENS

    @property
    def prompt(self) -> dict[str, Any]:
        """As `LLM.generate` takes it."""
        prompt: dict[str, Any] = {"prompt": self.text}
        if self.pictures:
            prompt["multi_modal_data"] = {"image": list(self.pictures)}
        if self.budget is not None:
            prompt["mm_processor_kwargs"] = {"autoprune": {"budget": self.budget}}
        return prompt


class Reference:
    """The model in transformers, pruned by the library."""

    def __init__(self, folder: Path):
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        # Both sides go on behind an end token.
        self.model.generation_config.eos_token_id = None

    def text(self, question: str, pictures: int = 1) -> str:
        """The prompt of a question about pictures, by the processor's template."""
        content: list[dict[str, str]] = [{"type": "image"}] * pictures
        content = [*content, {"type": "text", "text": question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )

    def answer(self, ask: Ask, method: str, **options: Any) -> list[int]:
        """Greedy tokens."""
        ids, _ = self.run(ask, method, **options)
        return ids

    @torch.no_grad()
    def run(self, ask: Ask, method: str, **options: Any) -> tuple[list[int], Any]:
        """Greedy tokens, and what was pruned, by name of the method and with its options."""
        inputs = self.processor(
            images=ask.pictures, text=ask.text, return_tensors="pt", add_special_tokens=False
        )
        length = inputs["input_ids"].shape[1]
        settings = {"max_new_tokens": ask.new_tokens, "do_sample": False}
        scores = options.pop("vision_scores", None)
        if ask.budget is None:
            return self.model.generate(**inputs, **settings)[0, length:].tolist(), None
        pruning = autoprune.create(method, ask.budget, **options)
        with pruning(self.model, vision_scores=scores) as trace:
            ids = self.model.generate(**inputs, **settings)[0, length:].tolist()
        return ids, trace.samples[0]


def start(folder: Path, **options: Any) -> LLM:
    """An engine of vLLM."""
    defaults = {
        "dtype": "float32",
        "max_model_len": 384,
        "enforce_eager": True,
        "block_size": 32,
        "limit_mm_per_prompt": {"image": 2},
        "disable_log_stats": True,
        "seed": 0,
    }
    return LLM(str(folder), **(defaults | options))


def generate(llm: LLM, asks: Sequence[Ask]) -> list[Any]:
    """What vLLM says, all at once."""
    settings = [
        SamplingParams(temperature=0, max_tokens=ask.new_tokens, ignore_eos=True) for ask in asks
    ]
    return llm.generate([ask.prompt for ask in asks], settings, use_tqdm=False)


def answers(llm: LLM, asks: Sequence[Ask]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in generate(llm, asks)]


def model_of(llm: LLM) -> Any:
    """The model inside of an engine of this process."""
    return llm.apply_model(lambda model: [model])[0][0]


def prune_by(llm: LLM, name: str, **options: Any) -> None:
    """Have the running engine prune by another method, as a server started with it would."""
    model_of(llm).prune_by(autoprune.create(name, 1, **options))
    llm.reset_prefix_cache()
    llm.reset_mm_cache()
    engine = llm.llm_engine.engine_core.engine_core
    engine.reset_encoder_cache()


def pictures(number: int, sizes: Sequence[tuple[int, int]] = ((64, 64),)) -> list[Image.Image]:
    """Pictures of random blocks, of the (width, height) given, in turn."""
    random = np.random.default_rng(5)
    made = []
    for i in range(number):
        width, height = sizes[i % len(sizes)]
        blocks = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        made.append(Image.fromarray(blocks).resize((width, height), Image.Resampling.BILINEAR))
    return made
