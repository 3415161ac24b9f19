"""Methods and budgets compared on held-out questions of the second benchmark model.

    python compare.py --methods "autoprune,summary@autoprune:merger=summary" --budgets 1/9,1/18 --output RUN

Every setting answers the same questions greedily, in the order in which settings are given. RUN/results.json is
written anew after each one, so a run can be stopped at any time; the same call goes on, and a call with more
settings adds to it. Beside accuracy stand two figures that need no labels: how often the answer is the unpruned
model's, and the KL divergence of the first token's distribution from the unpruned model's, in nats.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from model import load
from questions import EASY, HARD, heldout_questions

from autoprune import __version__
from autoprune.commands.compare import parse_budgets
from autoprune.commands.inputs import build_method, parse_budget, parse_methods
from autoprune.errors import UnsupportedError
from autoprune.evaluation import Setting, Task, is_right
from autoprune.evaluation.batches import Batch, longest_answer, prepare
from autoprune.evaluation.encoding import encoder
from autoprune.evaluation.settings import REFERENCE
from autoprune.evaluation.statistics import Estimate, Means, bootstrap
from autoprune.files import write_whole
from autoprune.tuning.agreement import LIKELY, divergence

RESULTS = Path(__file__).parents[1] / "results" / "second_model_compare.json"
FIGURES = ("accuracy", "agreement", "divergence", "entering", "flops")
Record = dict[str, Any]


def main() -> None:
    """Answer what is not answered yet, and write the table after every setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="autoprune", help="as for autoprune compare")
    parser.add_argument("--budgets", default="1/9", help="by commas")
    parser.add_argument("--questions", type=int, default=40, help="of each kind")
    parser.add_argument("--kinds", nargs="+", default=list(EASY + HARD))
    parser.add_argument("--seed", type=int, default=0, help="which questions")
    parser.add_argument("--batch-size", type=int, default=60)
    parser.add_argument("--decoder", type=Path, help="GGUF file or a folder of save_pretrained")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", help="of weights and inputs")
    parser.add_argument("--folder", type=Path, required=True, help="answers, to go on from")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the table as JSON")
    options = parser.parse_args()
    settings = list(settings_of(options.methods, options.budgets))
    model, processor = load(decoder=options.decoder)
    model.to(options.device, getattr(torch, options.dtype))
    tasks = tasks_of(options.questions, options.kinds, options.seed)
    encode = encoder(model, settings)
    batches = prepare(model, processor, tasks, options.batch_size, encode=encode)
    asked = Answering(model, processor, batches, longest_answer(processor, tasks), options)
    found: dict[Setting, list[Record] | str] = {}
    for setting in [REFERENCE, *settings]:
        found[setting] = asked.records(setting)
        table = rows(found)
        write_whole(options.output, json.dumps({**described(options), "rows": table}, indent=1))
        print(line(table[-1]), flush=True)


def tasks_of(per_kind: int, kinds: Sequence[str] = EASY + HARD, seed: int = 0) -> list[Task]:
    """Held-out questions, each about a scene of its own, the kinds taking turns."""
    drawn = heldout_questions(per_kind, kinds, seed)
    return [
        Task(f"{seed}-{index}", question.kind, question.text, (question.answer,), scene.image)
        for index, (scene, question) in enumerate(drawn)
    ]


def settings_of(methods: str, budgets: str) -> Iterator[Setting]:
    """Methods under budgets, budget by budget."""
    chosen = parse_methods("--methods", methods)
    for budget in parse_budgets(budgets):
        for label, name, assignments in chosen:
            try:
                method = build_method(name, parse_budget(budget), {}, assignments)
            except ValueError as error:
                yield Setting(label, budget, None, str(error))
            else:
                yield Setting(label, budget, method)


class Answering:
    """The questions, and the folder in which their answers are kept, a file for each setting."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        batches: Sequence[Batch],
        new_tokens: int,
        options: argparse.Namespace,
    ) -> None:
        self.model, self.processor, self.batches = model, processor, batches
        self.new_tokens = new_tokens
        # What decides the answers of a setting is in its file's path.
        name = f"{options.questions}_{options.seed}_{options.batch_size}_{options.dtype}"
        self.folder = options.folder / f"{name}_{len(options.kinds)}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def records(self, setting: Setting) -> list[Record] | str:
        """A record for each question; or why the setting cannot run."""
        if setting.method is None:
            return setting.refusal
        path = self.folder / f"{setting.name}.jsonl"
        written = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        done: list[Record] = []
        for index, batch in enumerate(self.batches):
            if len(written) < len(done) + len(batch.tasks):
                try:
                    new = self.ask(setting, index, batch)
                except (ValueError, UnsupportedError) as error:
                    return str(error)
                written = [*written[: len(done)], *map(json.dumps, new)]
                write_whole(path, "\n".join(written) + "\n")
            done += map(json.loads, written[len(done) : len(done) + len(batch.tasks)])
        return done

    @torch.inference_mode()
    def ask(self, setting: Setting, index: int, batch: Batch) -> list[Record]:
        """Greedy answers to one batch, compared with the unpruned model's."""
        method = setting.method
        assert method is not None
        inputs = batch.pixels() if method.tower().merge else batch.inputs()
        first = FirstToken()
        with method(self.model) as trace:
            ids = self.model.generate(
                **inputs,
                max_new_tokens=self.new_tokens,
                do_sample=False,
                logits_processor=[first],
            )
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = [
            text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)
        ]
        apart = self.divergence(setting, index, first.logs)
        plain = texts if setting is REFERENCE else self.plain_texts(index)
        return [
            {
                "id": task.id,
                "kind": task.kind,
                "prediction": text,
                "accuracy": float(is_right(text, task.answers)),
                "agreement": float(text == own),
                "divergence": round(kl, 6),
                "entering": sample.mean_tokens,
                "flops": sample.total_flops,
            }
            for task, text, own, kl, sample in zip(
                batch.tasks, texts, plain, apart, trace.samples, strict=True
            )
        ]

    def divergence(self, setting: Setting, index: int, logs: torch.Tensor) -> list[float]:
        """Nats, of each first token of a batch; the unpruned model's distributions are kept."""
        path = self.folder / f"plain_{index}.npz"
        if setting is REFERENCE:
            top = logs.topk(LIKELY)
            np.savez(path, likely=top.indices.cpu().numpy(), logs=top.values.cpu().numpy())
        with np.load(path) as kept:
            likely, own = (
                torch.from_numpy(kept[name]).to(logs.device) for name in ("likely", "logs")
            )
        return divergence(likely, own, logs).tolist()

    def plain_texts(self, index: int) -> list[str]:
        """What the unpruned model answered to a batch."""
        start = sum(len(batch.tasks) for batch in self.batches[:index])
        lines = (self.folder / f"{REFERENCE.name}.jsonl").read_text(encoding="utf-8").splitlines()
        chosen = lines[start : start + len(self.batches[index].tasks)]
        return [json.loads(line)["prediction"] for line in chosen]


class FirstToken:
    """Notes the logarithms of the first token's probabilities; a `LogitsProcessor` that changes nothing."""

    def __init__(self) -> None:
        self.logs: torch.Tensor

    def __call__(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "logs"):
            self.logs = logits.float().log_softmax(-1)
        return logits


def rows(found: dict[Setting, list[Record] | str]) -> list[Record]:
    """One row for each setting, with paired 95 % intervals.

    Differences are to AutoPrune as it is at the same budget.
    """
    ran = {setting: given for setting, given in found.items() if not isinstance(given, str)}
    kinds = [record["kind"] for record in ran[REFERENCE]]
    values = [
        np.array([[record[figure] for record in given] for given in ran.values()], float)
        for figure in FIGURES
    ]
    means = dict(zip(FIGURES, bootstrap(values, kinds), strict=True))
    order = list(ran)
    rivals = {
        setting.budget: own for own, setting in enumerate(order) if setting.label == "autoprune"
    }
    table = []
    for setting, given in found.items():
        row: Record = {"method": setting.label, "budget": setting.budget}
        if isinstance(given, str):
            table.append({**row, "refused": given})
            continue
        own, rival = order.index(setting), rivals.get(setting.budget)
        row["entering"] = round(means["entering"].macro.measured[own], 3)
        row["flops_share"] = round(means["flops"].macro.ratio(own, 0).value, 4)
        for figure in ("accuracy", "agreement", "divergence"):
            row |= columns(figure, means[figure], own, rival)
        row["by_kind"] = {
            kind: round(one.measured[own], 4) for kind, one in means["accuracy"].kinds.items()
        }
        table.append(row)
    return table


def columns(figure: str, means: Means, own: int, rival: int | None) -> Record:
    """A figure with its interval, and its difference to the rival's."""
    row = {figure: interval(means.macro.estimate(own))}
    if rival not in (None, own):
        row[f"{figure}_difference"] = interval(means.macro.difference(own, rival))
    return row


def interval(estimate: Estimate) -> list[float | None]:
    """Value, lower and upper bound."""
    values = (estimate.value, estimate.low, estimate.high)
    return [None if value is None else round(value, 4) for value in values]


def described(options: argparse.Namespace) -> Record:
    """How the table was made."""
    return {
        "command": "python compare.py " + shlex.join(sys.argv[1:]),
        "questions": options.questions * len(options.kinds),
        "intervals": "95 %, bootstrap over the questions of each kind, paired",
        "device": options.device,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "dtype": options.dtype,
        "autoprune": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def line(row: Record) -> str:
    """A row as text."""
    name = f"{row['budget']:>5} {row['method']:32}"
    if "refused" in row:
        return f"{name} {row['refused']}"
    text = f"{name} {row['entering']:6.2f} {row['flops_share']:.3f}"
    for figure in ("accuracy", "agreement", "divergence"):
        value, low, high = row[figure]
        text += f"  {value:.3f}" + ("" if low is None else f" ({low:.3f} to {high:.3f})")
        if f"{figure}_difference" in row:
            change, low, high = row[f"{figure}_difference"]
            text += f" {change:+.3f}" + ("" if low is None else f" [{low:+.3f}, {high:+.3f}]")
    return text + "  " + " ".join(f"{kind} {value:.2f}" for kind, value in row["by_kind"].items())


if __name__ == "__main__":
    main()
