"""Accuracy of the second benchmark model by kind of question, greedy, with nothing pruned.

    python evaluate.py --per-kind 200

Beside it stand what the same model answers about the picture of another question ("swapped"), and what the
commonest answer to each wording would reach ("floor").
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from model import load
from PIL import Image
from questions import EASY, HARD, Question, floor_without_picture, heldout_questions

WEIGHTS = Path(__file__).parent / "weights.safetensors"


def main() -> None:
    """Evaluate and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--decoder", type=Path, help="GGUF file or a folder of save_pretrained")
    parser.add_argument("--per-kind", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the numbers here")
    options = parser.parse_args()
    model, processor = load(options.weights, options.decoder)
    model.to(options.device)
    chosen = heldout_questions(options.per_kind, seed=options.seed)
    questions = [question for _, question in chosen]
    images = [scene.image for scene, _ in chosen]
    # The next question of the same kind gives the picture.
    swapped = images[len(EASY + HARD) :] + images[: len(EASY + HARD)]
    found = {
        "own": answer(model, processor, questions, images, options.batch),
        "swapped": answer(model, processor, questions, swapped, options.batch),
    }
    numbers = {
        kind: {
            **{
                name: _accuracy(
                    [
                        (question, given)
                        for question, given in zip(questions, answers, strict=True)
                        if question.kind == kind
                    ]
                )
                for name, answers in found.items()
            },
            "floor": floor_without_picture([one for one in questions if one.kind == kind]),
        }
        for kind in EASY + HARD
    }
    for kind, row in numbers.items():
        print(f"{kind:10}", "  ".join(f"{name} {value:.3f}" for name, value in row.items()))
    for name, kinds in (("easy", EASY), ("hard", HARD), ("all", EASY + HARD)):
        print(f"{name:10} own {sum(numbers[kind]['own'] for kind in kinds) / len(kinds):.3f}")
    if options.out:
        options.out.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def _accuracy(pairs: Sequence[tuple[Question, str]]) -> float:
    return round(sum(given == question.answer for question, given in pairs) / len(pairs), 4)


@torch.no_grad()
def answer(
    model, processor, questions: Sequence[Question], images: Sequence[Image.Image], batch: int
) -> list[str]:
    """Greedy answers, in the order of the questions; prompts of one length go together."""
    by_length = defaultdict(list)
    for index, question in enumerate(questions):
        by_length[len(processor.tokenizer.encode(question.text))].append(index)
    given = [""] * len(questions)
    for same in by_length.values():
        for start in range(0, len(same), batch):
            some = same[start : start + batch]
            inputs = processor(
                text=[prompt(processor, questions[index].text) for index in some],
                images=[images[index] for index in some],
                return_tensors="pt",
            ).to(model.device)
            tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
            texts = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for index, text in zip(some, texts, strict=True):
                given[index] = text.strip()
    return given


def prompt(processor, question: str) -> str:
    """The text of a question about one picture, up to where the answer begins."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, add_generation_prompt=True)


if __name__ == "__main__":
    main()
