"""The second benchmark model's scenes, questions, packing and weights, on a small random decoder."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).parents[1] / "benchmarks" / "second_model"
MODULES = ("scenes", "questions", "model", "packed", "data", "train")


@pytest.fixture(scope="module")
def second():
    """The folder's modules, over grey noise in place of photographs."""
    sys.path.insert(0, str(FOLDER))
    try:
        found = SimpleNamespace(**{name: __import__(name) for name in MODULES})
        noise = np.random.default_rng(0).integers(60, 190, (3, 120, 130, 3), dtype=np.uint8)
        found.scenes._photographs = lambda split: [list(noise)]
        yield found
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tokenizer(second):
    """A token for each word, mark and line break."""
    rng = random.Random(0)
    texts = [second.model.CHAT_TEMPLATE, "user", "assistant", "\n"]
    for seed in range(150):
        scene = second.scenes.draw_scene(seed, "train")
        for kind in second.questions.KINDS:
            question = second.questions.ask(scene, kind, rng)
            texts += [f"{question.text} {question.answer}"] if question else []
    split = pre_tokenizers.Split(Regex(r"\w+|\n|[^\w\s]"), "removed", invert=True)
    words = dict.fromkeys(word for text in texts for word, _ in split.pre_tokenize_str(text))
    special = ["<unk>", "<|im_start|>", "<|im_end|>", second.model.IMAGE_TOKEN]
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = split, decoders.Fuse()
    inner.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<unk>", eos_token="<|im_end|>"
    )


@pytest.fixture
def decoder(tokenizer):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            initializer_range=0.2,
        )
    )


@pytest.fixture
def whole(second, decoder, tokenizer):
    """The model, and an adapter that changes it."""
    model = second.model.build(decoder, tokenizer, width=64, layers=1)
    adapter = second.model.Adapter(model.model.language_model, rank=3)
    for up in adapter.up.values():
        torch.nn.init.normal_(up, std=0.1)
    return model, adapter


def thing(second, kind, name, colour, *cells):
    return second.scenes.Thing(kind, name, colour, cells, (0, 0, 8, 8))


@pytest.fixture
def scene(second):
    """Row by row: red star, 7, blue heart; the word lamp, red moon's place empty; red heart, -, 9."""
    return SimpleNamespace(
        things=(
            thing(second, "symbol", "star", "red", (0, 0)),
            thing(second, "digit", "7", "", (0, 1)),
            thing(second, "symbol", "heart", "blue", (0, 2)),
            thing(second, "word", "lamp", "", (1, 0), (1, 1)),
            thing(second, "symbol", "heart", "red", (2, 0)),
            thing(second, "symbol", "sun", "black", (2, 1)),
            thing(second, "digit", "9", "", (2, 2)),
        )
    )


RIGHT = {
    "Which colour does the star have?": "red",
    "Which colour does the sun have?": "black",
    "Can you see a heart in the picture?": "yes",
    "Can you see an anchor in the picture?": "no",
    "Read the printed word.": "lamp",
    "Count the hearts.": "2",
    "Count the red symbols.": "2",
    "Count the suns.": "1",
    "Count the green symbols.": "0",
    "Is the star higher up than the sun?": "yes",
    "Is the sun higher up than the star?": "no",
    "Is the star further left than the sun?": "yes",
    "Add up the two digits.": "16",
    "Which colour has the symbol to the left of the sun?": "red",
    "In which row is the sun?": "bottom",
    "In which column is the sun?": "middle",
    "What is at the middle middle?": "word lamp",
    "What is at the middle right?": "nothing",
    "What is at the bottom right?": "digit 9",
    "What is at the top right?": "blue heart",
    "List all things row by row.": (
        "red star, digit 7, blue heart; word lamp; red heart, black sun, digit 9"
    ),
}


def test_answers_are_those_worked_out_by_hand(second, scene):
    rng = random.Random(0)
    asked = {}
    for kind in second.questions.KINDS:
        for _ in range(300):
            question = second.questions.ask(scene, kind, rng)
            if question:
                assert asked.setdefault(question.text, question.answer) == question.answer
    assert {text: asked.get(text) for text in RIGHT} == RIGHT
    # Hearts come twice, so nothing is asked of "the heart"; two digits leave no single one.
    assert not [
        text for text in asked if "the heart " in text or "heart?" in text.split("the ")[-1]
    ]
    assert "Which digit was written by hand?" not in asked


def test_splits_share_no_photograph_and_no_digit(second):
    train, heldout = (set(second.scenes.PHOTOGRAPHS[split]) for split in second.scenes.SPLITS)
    assert not train & heldout
    one, other = (second.scenes.draw_scene(3, split) for split in second.scenes.SPLITS)
    assert (one.pixels != other.pixels).any()
    assert (second.scenes.draw_scene(3, "train").pixels == one.pixels).all()


def test_patches_are_labelled_where_things_are(second):
    scene = second.scenes.draw_scene(1)
    labels = second.scenes.patch_labels(scene)
    assert labels.shape == (12, 12, 4)
    for item in scene.things:
        left, top, right, bottom = item.box
        row, column = (top + bottom) // 16, (left + right) // 16
        layer = {"symbol": 0, "digit": 2, "word": 3}[item.kind]
        names = (list(second.scenes.SYMBOLS), None, list("0123456789"), second.scenes.WORDS)[layer]
        assert names[labels[row, column, layer] - 1] == item.name
    for row in range(3):
        for column in range(3):
            if not any((row, column) in item.cells for item in scene.things):
                assert not labels[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].any()


def test_heldout_answers_are_balanced(second):
    chosen = second.questions.heldout_questions(20, ("presence", "count"))
    answers = [
        [one.answer for _, one in chosen if one.kind == kind] for kind in ("presence", "count")
    ]
    assert answers[0].count("yes") == 10
    assert [answers[1].count(str(number)) for number in range(5)] == [4] * 5


def test_packed_questions_are_answered_as_if_each_were_alone(second, whole, tokenizer):
    model, adapter = whole
    scene = second.scenes.draw_scene(2, "train")
    rng = random.Random(0)
    kinds = [kind for kind in second.questions.KINDS if second.questions.ask(scene, kind, rng)]
    questions = [second.questions.ask(scene, kind, rng) for kind in kinds]
    packer = second.packed.Packer(tokenizer, 250)
    rows = packer.pack(questions)[None]
    visual = second.packed.features(model, torch.from_numpy(scene.pixels)[None])
    places = torch.from_numpy(second.packed.answer_places(rows))
    head = torch.tensor(packer.head)
    packed = second.packed.answer_logits(
        model, adapter, visual, torch.from_numpy(rows), places, head
    )
    second.model.merge(model, adapter)
    processor = second.model.build_processor(tokenizer)
    alone = []
    for question in questions:
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(images=scene.image, text=text, return_tensors="pt")
        answer = tokenizer.encode(question.answer + "<|im_end|>", add_special_tokens=False)
        tokens = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
        with torch.no_grad():
            logits = model(input_ids=tokens, pixel_values=inputs["pixel_values"]).logits
        alone.append(logits[0, -len(answer) - 1 : -1])
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_weights_are_read_back_within_half_a_step(second, whole, tmp_path):
    parts = second.model.trained(*whole)
    path = tmp_path / "weights.safetensors"
    second.model.save_weights(path, parts)
    before = {name: weight.clone() for name, weight in parts.state_dict().items()}
    with torch.no_grad():
        for parameter in parts.parameters():
            parameter.zero_()
    second.model.load_weights(path, parts)
    for name, weight in parts.state_dict().items():
        rows = before[name].flatten(1) if weight.ndim == 4 else before[name]
        step = rows.abs().amax(-1, keepdim=True) / 127 if weight.ndim > 1 else rows.abs() * 2e-3
        assert ((weight.reshape(rows.shape) - rows).abs() <= 0.6 * step + 1e-6).all(), name
    count = sum(weight.numel() for weight in before.values())
    assert path.stat().st_size < 1.6 * count


def test_steps_teach_what_only_the_pictures_say(second, decoder, tokenizer):
    """Eight pictures learned by heart: right with their own picture, not with another's."""
    torch.manual_seed(0)
    model = second.model.build(decoder, tokenizer, width=64, layers=1)
    model.requires_grad_(False)
    parts = second.model.trained(model, second.model.Adapter(model.model.language_model, 4))
    parts.requires_grad_(True)
    packer = second.packed.Packer(tokenizer, 61)
    scenes = [second.scenes.draw_scene(seed, "train") for seed in range(8)]
    rng = random.Random(0)
    questions = [[second.questions.ask(scene, "cell", rng)] for scene in scenes]
    pixels = np.stack([scene.pixels for scene in scenes])
    rows = np.stack([packer.pack(asked) for asked in questions])
    second.train.scale_projector(model, torch.from_numpy(pixels))
    options = SimpleNamespace(device="cpu", compile=False)
    step = second.train.Step(model, parts["adapter"], packer.head, options)
    optimizer = torch.optim.AdamW(parts.parameters(), lr=3e-3)
    for _ in range(60):
        step(pixels, rows)
        torch.nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    kinds = ["cell"] * 8
    assert step.accuracy(kinds, pixels, rows)["cell"] == 1.0
    assert step.accuracy(kinds, np.roll(pixels, 1, 0), rows)["cell"] < 0.5
