"""Long answers, a second question on the same pruned cache, and several pictures: what pruning does to them.

    python benchmarks/conversations.py
    PYTHONPATH=benchmarks/second_model python benchmarks/conversations.py --model second --decoder FILE

* `long`: the model lists everything in the picture. Each thing is a fact; precision, recall and F1 of facts.
* `second question`: a question is answered, then another one about the same picture. `alone` has a prompt of
  its own, and is pruned for it. `later` goes on with the cache that was pruned for the first question.
* `two pictures`: a question about the second of two pictures, nothing of which is named in the question about
  the first.

Every setting answers the same held-out questions greedily, one prompt at a time. Writes
benchmarks/results/conversations_MODEL.json after every setting.
"""

from __future__ import annotations

import json
import platform
import random
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from transformers import DynamicCache

import autoprune
from autoprune import tiny
from autoprune.commands.compare import parse_budgets
from autoprune.commands.inputs import build_method, parse_budget, parse_methods
from autoprune.evaluation import is_right
from autoprune.evaluation.settings import REFERENCE
from autoprune.evaluation.statistics import bootstrap
from autoprune.files import write_whole
from autoprune.methods.base import Method

RESULTS = Path(__file__).parent / "results"
METHODS = (
    "autoprune,summary@autoprune:merger=summary,first_ranking=text,"
    "peek@autoprune:first_cut=peek,first_ranking=text+diversity,merger=summary,"
    "divprune,divprune+@divprune:merger=summary,uniform,fastv"
)
LONGEST = 96
"""New tokens of a list at most."""
SHORTEST = 12
"""Of other answers."""
MARK = "ANSWER"
FIGURES = ("precision", "recall", "F1", "first", "alone", "later", "two pictures")


@dataclass(frozen=True)
class Asked:
    """A picture with what is asked about it, and a picture that shows nothing the last question names."""

    image: Any
    listed: str
    first: tuple[str, str]
    second: tuple[str, str]
    other: Any


@dataclass
class Model:
    """A benchmark model: how to draw a scene, how to ask about it, and what a scene shows."""

    model: Any
    processor: Any
    list_kind: str
    kinds: Sequence[str]
    single_kinds: Sequence[str]
    draw: Any
    ask: Any
    names: Any
    scenes: Iterator[Any] = field(init=False)

    def examples(self, count: int, seed: int) -> list[Asked]:
        """Held-out scenes, each with a list and two questions of different kinds."""
        rng, scenes = random.Random(seed), (self.draw(seed * 10_000_000 + i) for i in range(10**7))
        found: list[Asked] = []
        while len(found) < count:
            scene = next(scenes)
            listed = self.ask(scene, self.list_kind, rng)
            kinds = rng.sample(list(self.kinds), 1) + rng.sample(list(self.single_kinds), 1)
            questions = [self.ask(scene, kind, rng) for kind in kinds]
            if listed is None or None in questions or questions[0][0] == questions[1][0]:
                continue
            words = set(re.findall(r"\w+", questions[1][0].casefold()))
            other = next(scenes)
            while words & self.names(other):
                other = next(scenes)
            found.append(Asked(scene.image, listed[1], *questions, other.image))
        return found

    def inputs(self, images: Sequence[Any], messages: list[dict[str, Any]]) -> Any:
        text = self.text(messages)
        given = self.processor(
            images=list(images), text=text, return_tensors="pt", add_special_tokens=False
        )
        return given.to(self.model.device).to(self.model.dtype)

    def text(self, messages: list[dict[str, Any]]) -> str:
        """The template's, up to where the model goes on."""
        written: str = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return written

    @torch.inference_mode()
    def say(self, inputs: Any, longest: int, cache: Any = None) -> tuple[str, torch.Tensor]:
        """A greedy answer as text, and all tokens so far."""
        given = {} if cache is None else {"past_key_values": cache}
        ids = self.model.generate(**inputs, **given, max_new_tokens=longest, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        return self.processor.decode(new, skip_special_tokens=True).strip(), ids

    def goes_on(self, ids: torch.Tensor, question: str) -> dict[str, torch.Tensor]:
        """The tokens of the conversation so far with a further question behind them."""
        turns = [user("-"), {"role": "assistant", "content": [text_part(MARK)]}, user(question)]
        behind = self.text(turns).split(MARK)[1]
        tokenizer = self.processor.tokenizer
        new = tokenizer(behind, add_special_tokens=False, return_tensors="pt").input_ids
        new = new.to(ids.device)
        if ids[0, -1] == new[0, 0]:  # the answer has ended with what follows an answer
            new = new[:, 1:]
        whole = torch.cat([ids, new], dim=1)
        return {"input_ids": whole, "attention_mask": torch.ones_like(whole)}

    def list_prompt(self) -> str:
        question: str = self.ask(self.draw(1), self.list_kind, random.Random(0))[0]
        return question


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def user(question: str, pictures: int = 0) -> dict[str, Any]:
    """A message with so many pictures in front of its text."""
    return {"role": "user", "content": [{"type": "image"}] * pictures + [text_part(question)]}


def embedded() -> Model:
    """The model of the package."""
    from autoprune.tiny.questions import ask

    model, processor = tiny.load()

    def one(scene: Any, kind: str, rng: random.Random) -> tuple[str, str] | None:
        found = ask(scene, rng, [kind])
        return (found[0].text, found[0].answer) if found else None

    def names(scene: Any) -> set[str]:
        own = {
            word for item in scene.objects for word in (item.kind, item.shape, item.text) if word
        }
        return {word.casefold() for word in own}

    return Model(
        model,
        processor,
        "describe",
        (*tiny.EASY, *tiny.HARD),
        ("colour", "digit"),
        lambda seed: tiny.draw_scene(seed, "heldout"),
        one,
        names,
    )


def second(decoder: Path | None) -> Model:
    """The model of benchmarks/second_model."""
    from model import load
    from questions import EASY, HARD, ask
    from scenes import draw_scene

    model, processor = load(decoder=decoder)

    def one(scene: Any, kind: str, rng: random.Random) -> tuple[str, str] | None:
        found = ask(scene, kind, rng)
        return None if found is None else (found.text, found.answer)

    def names(scene: Any) -> set[str]:
        return {word.casefold() for thing in scene.things for word in (thing.kind, thing.name)}

    return Model(
        model,
        processor,
        "list",
        (*EASY, *HARD),
        ("colour", "word", "digit"),
        lambda seed: draw_scene(seed, "heldout"),
        one,
        names,
    )


def facts(text: str) -> Counter[str]:
    """What a list names, each as often as it names it."""
    parts = (part.strip(" .") for part in re.split(r"[,;]", text.casefold()))
    return Counter(part for part in parts if part and part != "nothing")


def scores(asked: Model, method: Method, example: Asked, request: str) -> dict[str, float]:
    """All figures of one example, from 0 to 1."""
    found: dict[str, float] = {}
    with method(asked.model) as trace:
        listed, _ = asked.say(asked.inputs([example.image], [user(request, 1)]), LONGEST)
        given, right = facts(listed), facts(example.listed)
        hits = sum((given & right).values())
        found["precision"] = hits / max(sum(given.values()), 1)
        found["recall"] = hits / max(sum(right.values()), 1)
        found["F1"] = 2 * hits / max(sum(given.values()) + sum(right.values()), 1)
        (question, answer), (later, expected) = example.first, example.second
        cache = DynamicCache()
        inputs = asked.inputs([example.image], [user(question, 1)])
        said, ids = asked.say(inputs, SHORTEST, cache)
        found["first"] = float(is_right(said, [answer]))
        said, _ = asked.say(asked.goes_on(ids, later), SHORTEST, cache)
        found["later"] = float(is_right(said, [expected]))
        said, _ = asked.say(asked.inputs([example.image], [user(later, 1)]), SHORTEST)
        found["alone"] = float(is_right(said, [expected]))
        pictures = [example.other, example.image]
        said, _ = asked.say(asked.inputs(pictures, [user(later, 2)]), SHORTEST)
        found["two pictures"] = float(is_right(said, [expected]))
        found["entering"] = float(np.mean([sample.mean_tokens for sample in trace.samples[:3]]))
    return found


def summarise(found: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Each setting's figures with 95 % intervals, and differences to the first one that prunes."""
    names = list(found)
    kinds = ["all"] * len(next(iter(found.values())))
    values = [np.array([[one[f] for one in own] for own in found.values()]) for f in FIGURES]
    means = bootstrap(values, kinds)
    table = []
    for index, name in enumerate(names):
        row: dict[str, Any] = {"setting": name}
        row["entering"] = round(float(np.mean([one["entering"] for one in found[name]])), 3)
        for figure, mean in zip(FIGURES, means, strict=True):
            own = mean.macro.estimate(index)
            row[figure] = [round(own.value, 4), round(own.low, 4), round(own.high, 4)]
            if index > 1:
                change = mean.macro.difference(index, 1)
                row[f"{figure}, difference"] = [
                    round(change.value, 4), round(change.low, 4), round(change.high, 4)
                ]  # fmt: skip
        table.append(row)
    return table


def main(
    model: Annotated[str, typer.Option(help="embedded or second")] = "embedded",
    decoder: Annotated[Path | None, typer.Option(help="the second model's decoder")] = None,
    methods: Annotated[str, typer.Option(help="as for autoprune compare")] = METHODS,
    budgets: Annotated[str, typer.Option(help="by commas")] = "1/9",
    examples: Annotated[int, typer.Option(help="pictures, each with all questions")] = 300,
    seed: Annotated[int, typer.Option(help="which pictures")] = 2000,
    output: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Ask every setting everything."""
    output = output or RESULTS / f"conversations_{model}.json"
    asked = embedded() if model == "embedded" else second(decoder)
    drawn, request = asked.examples(examples, seed), asked.list_prompt()
    settings: dict[str, Method] = {"full": REFERENCE.method}  # type: ignore[dict-item]
    for budget in parse_budgets(budgets):
        for label, name, options in parse_methods("--methods", methods):
            settings[f"{label} {budget}"] = build_method(name, parse_budget(budget), {}, options)
    found: dict[str, list[dict[str, float]]] = {}
    for label, method in settings.items():
        found[label] = [scores(asked, method, example, request) for example in drawn]
        table = summarise(found)
        result = {
            "command": "python benchmarks/conversations.py " + shlex.join(sys.argv[1:]),
            "examples": examples,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, float32",
            "autoprune": autoprune.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "rows": table,
        }
        write_whole(output, json.dumps(result, indent=1) + "\n")
        print(label, *(f"{figure} {table[-1][figure][0]:.3f}" for figure in FIGURES), flush=True)


if __name__ == "__main__":
    typer.run(main)
