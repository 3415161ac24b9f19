"""Accuracy of the embedded model with several methods, on held-out questions about drawn scenes.

python examples/compare_methods.py --questions 200 --budget 16 --methods autoprune fastv random

`autoprune compare` does this for every method, with confidence intervals.
"""

import argparse

import autoprune
from autoprune import tiny


def accuracy(model, processor, questions) -> float:
    """Share of right answers."""
    right = 0
    for scene, question in questions:
        answer = tiny.answer(model, processor, scene.image, question.text, max_new_tokens=8)
        right += tiny.is_correct(question, answer)
    return right / len(questions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=9)
    parser.add_argument("--budget", type=float, default=16)
    parser.add_argument("--methods", nargs="+", default=["autoprune", "sparsevlm", "random"])
    options = parser.parse_args()

    model, processor = tiny.load()
    questions = tiny.heldout_questions(options.questions)
    print(f"{'all tokens':24} {accuracy(model, processor, questions):.3f}")
    for name in options.methods:
        with autoprune.create(name, budget=options.budget)(model) as trace:
            share = accuracy(model, processor, questions)
        print(f"{name:24} {share:.3f}  {trace.summary()}")


if __name__ == "__main__":
    main()
