"""The embedded model: a small trained LLaVA, the scenes it knows, and questions about them.

Everything runs offline from the package's own files:

    from autoprune import tiny

    model, processor = tiny.load()
    scene = tiny.draw_scene(seed=7)
    for question in tiny.ask(scene, 0):
        print(question.text, tiny.answer(model, processor, scene.image, question.text))
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprune.quiet_imports import quiet_imports
from autoprune.tiny.questions import EASY, HARD, KINDS, Question, ask, heldout_questions, is_correct
from autoprune.tiny.scenes import Scene, SceneObject, draw_scene

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

__all__ = [
    "EASY",
    "HARD",
    "KINDS",
    "Question",
    "Scene",
    "SceneObject",
    "answer",
    "ask",
    "draw_scene",
    "heldout_questions",
    "is_correct",
    "load",
    "path",
    "prompt",
]


def path() -> Path:
    """The folder of the embedded model, for `from_pretrained`."""
    return Path(__file__).parent / "model"


def load(
    dtype: torch.dtype | None = None, folder: Path | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The embedded model in evaluation mode and its processor.

    The weights are stored in float16 and loaded as `dtype` (default: float32), from `folder` if
    another model of the recipe is wanted.
    """
    import torch

    with quiet_imports():
        from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = folder or path()
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the embedded model's weights are missing from {folder}: reinstall autoprune, or "
            f"train them with `python -m autoprune.tiny.recipe.train --export {folder}`"
        )
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype or torch.float32, local_files_only=True
    )
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)


def prompt(
    processor: LlavaProcessor,
    question_text: str,
    earlier_turns: tuple[tuple[str, str], ...] = (),
) -> str:
    """The text of a question about one picture, by the processor's chat template.

    `earlier_turns` are (question, answer) pairs about the same picture.
    """
    messages: list[dict[str, Any]] = []
    for text, reply in earlier_turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": text}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": reply}]})
    messages.append({"role": "user", "content": [{"type": "text", "text": question_text}]})
    messages[0]["content"].insert(0, {"type": "image"})
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    image: Image.Image,
    question_text: str,
    max_new_tokens: int = 64,
) -> str:
    """The model's greedy answer to one question about one picture."""
    inputs = processor(images=image, text=prompt(processor, question_text), return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new, skip_special_tokens=True).strip()
