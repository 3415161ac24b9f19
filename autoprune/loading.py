"""Load a checkpoint and its processor, from a folder or from the Hugging Face hub, and prepare its inputs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

DTYPES = ("auto", "float32", "bfloat16", "float16")

_LLAVAS_OWN = (
    "is a checkpoint in the format of LLaVA's own code, which transformers does not read; take its version "
    "for transformers, such as llava-hf/llava-1.5-7b-hf; one of Senna is converted by `python -m "
    "autoprune.models.senna`"
)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Loaded:
    """A model with its processor; `name` is what to call it in reports."""

    model: Any
    processor: Any
    name: str


def load_embedded(device: str = "auto", dtype: str = "auto", weights: bool = True) -> Loaded:
    """The model inside the package; arguments and errors as for `load_model`."""
    from . import tiny

    return replace(load_model(str(tiny.path()), device, dtype, weights), name="embedded model")


def load_model(
    name: str, device: str = "auto", dtype: str = "auto", weights: bool = True
) -> Loaded:
    """A checkpoint from a folder, or from the Hugging Face hub, as `from_pretrained` finds it.

    What is not in the local cache is downloaded, with the hub's progress bar, unless HF_HUB_OFFLINE
    is set.

    Args:
        name: folder, or the hub's name of a checkpoint, owner/model.
        device: "auto" takes a GPU if there is one.
        dtype: one of DTYPES; "auto" is the checkpoint's own, but float32 for float16 on a CPU.
        weights: False leaves them out: the model knows its shapes and cannot run. `device` is then where
            its weights are elsewhere, and need not be here.

    Raises:
        ValueError: no such folder or name, not a vision-language model, or files that cannot be read.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    from . import models

    models.register()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    target = pick_device(device) if weights else torch.device(device)
    _check_folder(name)
    if not Path(name).is_dir():
        show_downloads()
    try:
        # Without an answer, transformers would ask at the terminal whether to run foreign code.
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise ValueError(_unreadable(name, "read", error)) from error
    if hasattr(config, "mm_vision_tower"):
        raise ValueError(f"{name!r} {_LLAVAS_OWN}")
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(
            f"{name!r} is a {config.model_type!r} model, which takes no images; "
            "pass a vision-language model (image-text-to-text)"
        )
    try:
        # The processor first: if a package is missing for it, nothing large was downloaded.
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        wanted = _dtype(dtype, config, target)
        if not weights:
            return Loaded(_without_weights(config, wanted), processor, Path(name).name)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            name, dtype=wanted, trust_remote_code=False
        )
    except Exception as error:  # each file format and each missing package raises its own kind
        raise ValueError(_unreadable(name, "load", error)) from error
    model.to(device=target)
    return Loaded(model.eval(), processor, Path(name).name)


def _without_weights(config: Any, dtype: Any) -> Any:
    from transformers import AutoModelForImageTextToText

    stated = {} if dtype == "auto" else {"dtype": dtype}
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, **stated).eval()


def _check_folder(name: str) -> None:
    """Raise ValueError where `name` is neither the folder of a model nor a hub name."""
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"{name!r} is a file; give the folder of a checkpoint")
    if not folder.exists() and not is_hub_name(name):
        raise ValueError(
            f"there is no model folder {name!r}; give a folder, or a name of the Hugging Face hub "
            "such as llava-hf/llava-1.5-7b-hf"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{name!r} holds no model: there is no config.json in it")


def _unreadable(name: str, action: str, error: Exception) -> str:
    """Why a model could not be had; `action` is "read" or "load"."""
    reason = None if Path(name).is_dir() else why_not_from_hub(name, error)
    if reason is not None:
        return reason
    if "trust_remote_code" in str(error):
        if "cogvlm-" in name.lower():
            return (
                f"{name!r} is a checkpoint in the format of CogVLM's own code; convert it once by `python -m "
                "autoprune.models.cogvlm FOLDER OUTPUT` (docs/cogvlm.md), and give OUTPUT as the model"
            )
        return (
            f"the model {name!r} brings code of its own, which is not run; take a version of it for "
            "transformers, whose name often ends in -hf"
        )
    if "model type `llava_" in str(error):
        return f"{name!r} {_LLAVAS_OWN}"
    if "torchvision" in str(error).lower():
        return f"the processor of {name!r} needs torchvision: pip install torchvision"
    return f"cannot {action} the model {name!r}: {error}"


def prepare(loaded: Loaded, image: Image.Image | Sequence[Image.Image], question: str) -> Any:
    """Inputs of a picture, or of several in their order, and one question.

    The prompt is made by the processor: by a `conversation` of its own, or its chat template, if it has them.
    """
    processor = loaded.processor
    images = [image] if isinstance(image, Image.Image) else list(image)
    if getattr(processor, "chat_template", None):
        own = getattr(processor, "conversation", _conversation)
        inputs = processor.apply_chat_template(
            own(images, question),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    else:
        places = f"{getattr(processor, 'image_token', '<image>')}\n" * len(images)
        inputs = processor(images=images, text=[f"{places}{question}"], return_tensors="pt")
    return inputs.to(loaded.model.device).to(loaded.model.dtype)


def _conversation(images: Sequence[Image.Image], question: str) -> list[dict[str, Any]]:
    """Pictures, then the question."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


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


def is_hub_name(text: str) -> bool:
    """Whether `text` has the form of a hub name, owner/model."""
    return _HUB_NAME.fullmatch(text) is not None


def show_downloads() -> None:
    """Let the hub show its own progress bars; the bars of loading weights stay hidden."""
    from huggingface_hub import constants
    from huggingface_hub.utils import enable_progress_bars

    # The user's own switch has priority, and the hub would warn about it.
    if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()


def why_not_from_hub(name: str, error: BaseException) -> str | None:
    """Why a model of the hub cannot be had, and the way out; None if the hub is not the reason.

    transformers wraps the hub's errors, so those behind `error` are looked at, too.
    """
    from huggingface_hub import errors, is_offline_mode

    causes = list(_causes(error))

    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if among(errors.GatedRepoError):
        return (
            f"the model {name!r} is gated: accept its terms at https://huggingface.co/{name}, then "
            "log in with `hf auth login`"
        )
    if among(errors.RepositoryNotFoundError):
        return (
            f"there is no folder {name!r}, and the Hugging Face hub has no model of that name or it "
            "is private: check the name, or log in with `hf auth login`"
        )
    if is_offline_mode() and among(errors.LocalEntryNotFoundError):
        return (
            f"there is no folder {name!r}, and no complete model of that name in the local cache; "
            "HF_HUB_OFFLINE is set, so it is not downloaded: unset it, or copy the model into a folder"
        )
    if among(errors.LocalEntryNotFoundError, ConnectionError, TimeoutError):
        return (
            f"there is no folder {name!r}, no complete model of that name in the local cache, and the "
            "Hugging Face hub cannot be reached: check the connection and try again"
        )
    refused = [cause for cause in causes if isinstance(cause, errors.HfHubHTTPError)]
    if refused and not among(errors.EntryNotFoundError):
        return f"the Hugging Face hub refused to hand out {name!r}: {_first_line(refused[-1])}"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
