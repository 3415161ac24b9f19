"""Load a vision-language model from a folder, and put a question about a picture to it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.generation import BaseStreamer

from . import hub
from .methods.base import Method
from .trace import Sample

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Loaded:
    """A model with its processor; `name` is what to call it in reports."""

    model: Any
    processor: Any
    name: str


def load_embedded(device: str = "auto", dtype: str = "auto") -> Loaded:
    """The model inside the package; arguments and errors as for `load_model`."""
    from . import tiny

    return replace(load_model(str(tiny.path()), device, dtype), name="embedded model")


def load_model(name: str, device: str = "auto", dtype: str = "auto") -> Loaded:
    """A checkpoint from a folder, or from the Hugging Face hub, as `from_pretrained` finds it.

    What is not in the local cache is downloaded, with the hub's progress bar, unless HF_HUB_OFFLINE
    is set.

    Args:
        name: folder, or the hub's name of a checkpoint, owner/model.
        device: "auto" takes a GPU if there is one.
        dtype: one of DTYPES; "auto" is the checkpoint's own, but float32 for float16 on a CPU.

    Raises:
        ValueError: no such folder or name, not a vision-language model, or files that cannot be read.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    target = pick_device(device)
    _check_folder(name)
    if not Path(name).is_dir():
        hub.show_downloads()
    try:
        # Without an answer, transformers would ask at the terminal whether to run foreign code.
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise ValueError(_unreadable(name, "read", error)) from error
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(
            f"{name!r} is a {config.model_type!r} model, which takes no images; "
            "pass a vision-language model (image-text-to-text)"
        )
    try:
        # The processor first: if a package is missing for it, nothing large was downloaded.
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            name, dtype=_dtype(dtype, config, target), trust_remote_code=False
        )
    except Exception as error:  # each file format and each missing package raises its own kind
        raise ValueError(_unreadable(name, "load", error)) from error
    model.to(device=target)
    return Loaded(model.eval(), processor, Path(name).name)


def _check_folder(name: str) -> None:
    """Raise ValueError where `name` is neither the folder of a model nor a hub name."""
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"{name!r} is a file; give the folder of a checkpoint")
    if not folder.exists() and not hub.is_name(name):
        raise ValueError(
            f"there is no model folder {name!r}; give a folder, or a name of the Hugging Face hub "
            "such as llava-hf/llava-1.5-7b-hf"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{name!r} holds no model: there is no config.json in it")


def _unreadable(name: str, action: str, error: Exception) -> str:
    """Why a model could not be had; `action` is "read" or "load"."""
    reason = None if Path(name).is_dir() else hub.why(name, error)
    if reason is not None:
        return reason
    if "trust_remote_code" in str(error):
        return (
            f"the model {name!r} brings code of its own, which is not run; take a version of it for "
            "transformers, whose name often ends in -hf"
        )
    if "torchvision" in str(error).lower():
        return f"the processor of {name!r} needs torchvision: pip install torchvision"
    return f"cannot {action} the model {name!r}: {error}"


def prepare(loaded: Loaded, image: Image.Image, question: str) -> Any:
    """Inputs of one picture and one question, by the processor's chat template if it has one."""
    processor = loaded.processor
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    else:
        text = f"{getattr(processor, 'image_token', '<image>')}\n{question}"
        inputs = processor(images=[image], text=[text], return_tensors="pt")
    return inputs.to(loaded.model.device).to(loaded.model.dtype)


@dataclass(frozen=True)
class Answer:
    """A greedy answer, and the seconds from the prepared inputs to its first token and to its end."""

    text: str
    first_token_seconds: float
    seconds: float


@torch.inference_mode()
def answer(loaded: Loaded, inputs: Any, max_new_tokens: int) -> Answer:
    """The model's greedy answer, timed; the vision tower's part is in the time, too."""
    clock = _Clock()
    ids = loaded.model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, streamer=clock
    )
    new = ids[:, inputs["input_ids"].shape[1] :]
    text = str(loaded.processor.batch_decode(new, skip_special_tokens=True)[0]).strip()
    return Answer(text, clock.first_token, clock.end_of_answer)


def answer_pruned(
    loaded: Loaded, inputs: Any, method: Method, max_new_tokens: int
) -> tuple[Answer, Sample]:
    """The greedy answer with `method` pruning the prompt, and the prompt's record."""
    with method(loaded.model) as trace:
        given = answer(loaded, inputs, max_new_tokens)
    return given, trace.samples[0]


class _Clock(BaseStreamer):
    """Notes when `generate` hands out its tokens; it does so from the device, so they are ready then."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._handed_out = 0
        self.first_token = self.end_of_answer = 0.0

    def put(self, value: Any) -> None:
        # The prompt is handed out first.
        self._handed_out += 1
        if self._handed_out == 2:
            self.first_token = time.perf_counter() - self._start

    def end(self) -> None:
        self.end_of_answer = time.perf_counter() - self._start


def pick_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.zeros(1, device=target).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {device!r} is not available here; try cpu or auto") from error
    return target


def _dtype(dtype: str, config: Any, device: torch.device) -> Any:
    if dtype != "auto":
        return getattr(torch, dtype)
    stored = getattr(config, "dtype", None)
    return torch.float32 if device.type == "cpu" and stored == torch.float16 else "auto"
