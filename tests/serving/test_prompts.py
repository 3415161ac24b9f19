"""From messages to the model's inputs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from autoprune.loading import Loaded
from autoprune.serving.collate import batch_kind, collate
from autoprune.serving.errors import RequestError
from autoprune.serving.messages import Message, Part
from autoprune.serving.pictures import Pictures
from autoprune.serving.prompt import Prompt, Prompts
from tests.processors import processor
from tests.zoo import build

from .conftest import LIMITS, data_uri


def message(*texts: str, pictures: int = 0, role: Any = "user") -> Message:
    shown = [Part("messages[0].content[0]", picture="data:") for _ in range(pictures)]
    return Message(role, (*shown, *(Part("messages[0].content[1]", text=t) for t in texts)))


def prompts_of(family: str) -> tuple[Prompts, Any]:
    model, made = build(family), processor(family)
    ids = [model.config.image_token_id]
    return Prompts(Loaded(model, made, family), ids), made


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
def test_prompts_made_one_by_one_are_the_processors_batch(family: str) -> None:
    prompts, made = prompts_of(family)
    images = [Image.new("RGB", (56, 56), colour) for colour in ("red", "blue", "green")]
    words = [(" w1 w2", images[:1]), (" w3 w4 w5 w6", images[1:])]
    conversations = [[message(text, pictures=len(shown))] for text, shown in words]
    single = [
        prompts.make(messages, shown, 4)
        for messages, (_, shown) in zip(conversations, words, strict=True)
    ]
    assert batch_kind(single[0]) == batch_kind(single[1])
    batch = collate(single, made.tokenizer.pad_token_id)
    texts = [prompts._written(messages) for messages in conversations]
    expected = made(
        text=texts,
        images=[shown for _, shown in words],
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=False,
    )
    tensors = {name: value for name, value in expected.items() if torch.is_tensor(value)}
    assert set(batch) == set(tensors)
    for name, value in tensors.items():
        assert torch.equal(batch[name], value), name


def test_prompts_with_and_without_a_picture_share_a_batch() -> None:
    with_picture = Prompt(
        {"input_ids": torch.tensor([[5, 9, 6]]), "pixel_values": torch.ones(1, 3, 2, 2)}, 1, 2
    )
    types = Prompt({"input_ids": torch.tensor([[5]]), "mm_types": torch.tensor([[7]])}, 0, 1)
    batch = collate([with_picture, types], pad_id=8)
    assert batch["input_ids"].tolist() == [[5, 9, 6], [8, 8, 5]]
    assert batch["mm_types"].tolist() == [[0, 0, 0], [0, 0, 7]]
    assert batch["pixel_values"].shape == (1, 3, 2, 2)
    assert batch_kind(types) == ()


def test_texts_that_join_to_a_special_token_are_refused(loaded: Loaded) -> None:
    joining = copy.copy(loaded.processor)
    joining.chat_template = (
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    )
    prompts = Prompts(Loaded(loaded.model, joining, "joins"), [3])
    with pytest.raises(RequestError, match="make special tokens"):
        prompts.make([message("<ima", "ge>")], [], 4)
    assert prompts.make([message("<ima", "g>")], [], 4).num_visual == 0


def test_a_template_that_refuses_is_told(loaded: Loaded) -> None:
    strict = copy.copy(loaded.processor)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match=r"chat template refuses .* roles must alternate"):
        Prompts(Loaded(loaded.model, strict, "strict"), [3]).make([message("a")], [], 4)


def test_without_a_template_a_single_question_is_taken(loaded: Loaded, scene: Image.Image) -> None:
    bare = copy.copy(loaded.processor)
    bare.chat_template = None
    prompts = Prompts(Loaded(loaded.model, bare, "bare"), [3])
    assert prompts.make([message("what is it?", pictures=1)], [scene], 4).num_visual == 144
    with pytest.raises(RequestError, match="no chat template"):
        prompts.make([message("a"), message("b", role="assistant"), message("c")], [], 4)


def test_files_come_from_the_allowed_folder_alone(tmp_path: Path, scene: Image.Image) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    scene.save(folder / "a.png")
    scene.save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    pictures = Pictures(LIMITS, folder)
    assert pictures.load(Part("p", picture="file:a.png")).size == scene.size
    assert pictures.load(Part("p", picture=data_uri(scene))).size == scene.size
    for address in (
        "file:../secret.png",
        "file:link.png",
        f"file://{tmp_path}/secret.png",
        "file:",
        "file:b.png",
        "file:a\0.png",
    ):
        with pytest.raises(RequestError, match="names no file in the server's folder"):
            pictures.load(Part("p", picture=address))
    with pytest.raises(RequestError, match="are not read"):
        Pictures(LIMITS).load(Part("p", picture="file:a.png"))
