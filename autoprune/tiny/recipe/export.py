"""Write the trained model as an ordinary transformers folder: float16 weights and the processor."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

MAX_BYTES = 8_000_000


def export_model(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path
) -> None:
    """Save model and processor; each file is replaced in one step, so readers see whole files."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        temporary = Path(name)
        # The weights on disk are float16 copies: the model in training stays as it is.
        small = LlavaForConditionalGeneration(model.config).to(torch.float16)
        small.load_state_dict(model.state_dict())
        small.tie_weights()
        small.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        size = (temporary / "model.safetensors").stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"weights of {size} bytes, at most {MAX_BYTES} fit the package")
        for file in sorted(temporary.iterdir()):
            file.chmod(0o644)
            os.replace(file, folder / file.name)
