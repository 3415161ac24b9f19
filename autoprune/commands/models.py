"""Load a vision-language model from a folder, and put a question about a picture to it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..method import Method
from ..trace import Sample

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Loaded:
    """A model with its processor; `name` is what to call it in reports."""

    model: Any
    processor: Any
    name: str


def load_embedded(device: str = "auto", dtype: str = "auto") -> Loaded:
    """The model inside the package; arguments and errors as for `load_model`."""
    from .. import tiny

    return replace(load_model(str(tiny.path()), device, dtype), name="embedded model")


def load_model(name: str, device: str = "auto", dtype: str = "auto") -> Loaded:
    """A checkpoint from a folder, or from the local Hugging Face cache; nothing is downloaded.

    Args:
        name: folder, or the hub's name of a checkpoint that was downloaded before.
        device: "auto" takes a GPU if there is one.
        dtype: one of DTYPES; "auto" is the checkpoint's own, but float32 for float16 on a CPU.

    Raises:
        ValueError: no such folder, not a vision-language model, or files that cannot be read.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    target = pick_device(device)
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"{name!r} is a file; give the folder of a checkpoint")
    if not folder.exists() and not _HUB_NAME.fullmatch(name):
        raise ValueError(f"there is no model folder {name!r}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{name!r} holds no model: there is no config.json in it")
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(_unreadable(name, folder, error)) from error
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(
            f"{name!r} is a {config.model_type!r} model, which takes no images; "
            "pass a vision-language model (image-text-to-text)"
        )
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(
            name, dtype=_dtype(dtype, config, target), local_files_only=True
        )
        processor = AutoProcessor.from_pretrained(name, local_files_only=True)
    except Exception as error:  # each file format and each missing package raises its own kind
        raise ValueError(f"cannot load the model {name!r}: {error}") from error
    model.to(device=target)
    return Loaded(model.eval(), processor, folder.name)


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


@torch.inference_mode()
def answer(loaded: Loaded, inputs: Any, max_new_tokens: int) -> str:
    """The model's greedy answer."""
    ids = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = ids[:, inputs["input_ids"].shape[1] :]
    return str(loaded.processor.batch_decode(new, skip_special_tokens=True)[0]).strip()


def answer_pruned(
    loaded: Loaded, inputs: Any, method: Method, max_new_tokens: int
) -> tuple[str, Sample]:
    """The greedy answer with `method` pruning the prompt, and the prompt's record."""
    with method(loaded.model) as trace:
        text = answer(loaded, inputs, max_new_tokens)
    return text, trace.samples[0]


def _unreadable(name: str, folder: Path, error: Exception) -> str:
    if folder.is_dir():
        return f"cannot read the model in {name!r}: {error}"
    return (
        f"there is no model folder {name!r}, and no checkpoint of that name in the local cache; "
        f"download it first: hf download {name}"
    )


def pick_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {device!r} is not available here; try cpu or auto") from error
    return target


def _dtype(dtype: str, config: Any, device: torch.device) -> Any:
    if dtype != "auto":
        return getattr(torch, dtype)
    stored = getattr(config, "dtype", None)
    return torch.float32 if device.type == "cpu" and stored == torch.float16 else "auto"
