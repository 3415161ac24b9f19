"""The whole of it: split the prompts, ask the plain model, search, judge, and say what to use."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation import Options as Asking
from ..evaluation import Setting, Task
from ..evaluation.batches import prepare
from ..evaluation.comparison import decide_answers
from ..evaluation.encoding import encoder
from ..evaluation.progress import progress_bar
from ..evaluation.run_directory import claim
from ..evaluation.settings import REFERENCE
from ..evaluation.timing import prefill_milliseconds, timed_batches
from ..evaluation.workers import check_workers, threads_of_one
from ..methods import create
from ..methods.autoprune import AutoPrune
from ..methods.base import Method
from ..methods.tuned_file import ModelIdentity
from ..policy.budget import Budget
from .examination import Examination
from .fleet import RULES, STEPS, find_rules, open_to_all_layers, shared
from .judgement import DEFAULT, SAME, TUNED, Judged, choose, choose_rule, judge
from .result import Result, tuned_file
from .search import Search, Trial, check_optuna
from .space import SPACE, Space
from .split import PARTS, Split, split

TRIALS = 100
HELD_OUT = "held_out"


@dataclass(frozen=True)
class Options:
    """How a search runs.

    Args:
        trials: settings that are tried; a search that is done continues if there are to be more.
        seed: which prompts are held out, and what is proposed.
        methods: the methods to choose from.
        fleet: also find out by which rule a batch should share the budget (`tuning.fleet`).
        new_tokens: of an answer at most.
        batch_size: prompts at a time. workers: processes, on a CPU only.
        model_name: how the model is called in the file; default: its class.
        timing: measure the prefill of what is judged.
        command: how the search is called in its folder.
        show_progress: bars on stderr.
    """

    trials: int = TRIALS
    seed: int = 0
    methods: tuple[str, ...] = tuple(SPACE)
    fleet: bool = False
    new_tokens: int = 32
    batch_size: int = 64
    workers: int = 1
    model_name: str | None = None
    timing: bool = True
    command: str = "autoprune.tuning.tune"
    show_progress: bool = False


def tune(
    model: Any,
    processor: Any,
    prompts: Sequence[Task],
    budget: Budget,
    directory: Path,
    options: Options = Options(),
) -> Result:
    """Find the settings whose answers agree best with the plain model's, at this budget.

    The folder keeps the plain answers, the study and all scores; an interrupted call is continued by the
    same call.

    Args:
        model: in eval mode, on its device.
        prompts: pictures and questions; answers are not looked at.
        budget: of every trial. One over a batch asks for a fleet as `Options.fleet` does.

    Raises:
        ValueError: too few prompts, options out of range, a folder of another search, a picture that cannot be
            read.
        Refused: no settings can run on this model at this budget.
        ImportError: optuna is missing.
    """
    check_optuna()
    check_workers(options.workers, model.device)
    for name in ("trials", "new_tokens"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")
    if budget.over == "stream":
        raise ValueError(
            "settings and rules are found with a budget over a batch; tune that, and take what is found for a "
            'stream: replace(method, budget=replace(method.budget, over="stream"))'
        )
    if budget.over == "batch":
        budget = dataclasses.replace(budget, over="prompt")
        options = dataclasses.replace(options, fleet=True)
    space = Space.of(budget, options.methods)
    parts = split(prompts, options.seed)
    identity = ModelIdentity.of(model, options.model_name or type(model).__name__)
    _claim(model, prompts, space, directory, options)
    run = _Run(model, processor, space, parts, directory, options)
    tuning, held_out = run.examinations()
    search = run.search(tuning)
    judged, plain = run.judge(search.best, held_out)
    chosen, verdict = choose(judged)
    rules = None
    if options.fleet and isinstance(chosen.method, AutoPrune):
        rules, best = run.judge_rules(chosen.method, tuning, held_out)
        chosen, said = choose_rule(rules, best)
        verdict = f"{verdict}; {said}"
    elif options.fleet:
        verdict = f"{verdict}; {chosen.method.name} gives every prompt the same budget"
    everything, trials = [*judged, *(rules or [])], len(search.trials)
    file = tuned_file(chosen, verdict, everything, identity, parts, options.seed, trials)
    return Result(chosen, verdict, judged, plain, search.trials, file, rules)


@dataclass(frozen=True)
class _Run:
    """What every step needs."""

    model: Any
    processor: Any
    space: Space
    split: Split
    directory: Path
    options: Options

    def examinations(self) -> tuple[list[Examination], Examination]:
        """The parts to tune on, and what is held out, with the plain answers."""
        options = self.options
        asked = {f"part_{number}": part for number, part in enumerate(self.split.tuning)}
        asked[HELD_OUT] = self.split.held_out
        methods = [self.space.build(start) for start in self._buildable()]
        encode = encoder(self.model, [Setting(str(i), "", m) for i, m in enumerate(methods)])
        found = []
        with progress_bar(options.show_progress) as progress:
            bar = progress.add_task("plain answers", total=sum(map(len, asked.values())))
            for name, tasks in asked.items():
                found.append(
                    Examination.prepare(
                        name,
                        (self.model, self.processor),
                        tasks,
                        self.directory,
                        options.batch_size,
                        options.new_tokens,
                        options.workers,
                        encode,
                        not options.fleet,
                        lambda prompts: progress.advance(bar, prompts),
                    )
                )
        return found[:PARTS], found[PARTS]

    def search(self, tuning: Sequence[Examination]) -> Search:
        """Try settings, or go on trying."""
        options, each = self.options, self.split.tuned_on
        with progress_bar(options.show_progress) as progress:
            bar = progress.add_task("tuning", total=options.trials * each)

            def ask(method: Method, part: int) -> Any:
                return tuning[part].scores(method, lambda prompts: progress.advance(bar, prompts))

            def done(trial: Trial) -> None:
                progress.update(bar, completed=(trial.number + 1) * each)

            search = Search(self.space, ask, self.directory / "study.db", options.seed)
            search.run(options.trials, done)
        return search

    def judge(self, best: Trial, held_out: Examination) -> tuple[list[Judged], float | None]:
        """What was found beside the default and the baselines; and the plain model's milliseconds."""
        budget = self.space.budget
        contenders = {TUNED: self.space.build(best.candidate), DEFAULT: create("autoprune", budget)}
        contenders |= {name: create(name, budget) for name in SPACE if name != "autoprune"}
        with progress_bar(self.options.show_progress) as progress:
            total = len(contenders) * len(self.split.held_out)
            bar = progress.add_task("judging", total=total)
            judged = judge(
                contenders,
                lambda m: held_out.scores(m, lambda prompts: progress.advance(bar, prompts)),
                self.split.pictures,
            )
            progress.update(bar, completed=total)
        if not self.options.timing:
            return judged, None
        ran = [own for own in judged if own.agreement is not None]
        plain, *times = self._milliseconds([own.method for own in ran])
        timed = {own.label: spent for own, spent in zip(ran, times, strict=True)}
        return [
            dataclasses.replace(own, milliseconds=timed.get(own.label)) for own in judged
        ], plain

    def judge_rules(
        self, method: AutoPrune, tuning: Sequence[Examination], held_out: Examination
    ) -> tuple[list[Judged], str]:
        """The same budget for all and rules of who gets how much; and which rule was best in tuning."""
        sharing = open_to_all_layers(method)
        with progress_bar(self.options.show_progress) as progress:
            total = STEPS * self.split.tuned_on + (RULES + 1) * len(self.split.held_out)
            bar = progress.add_task("fleet", total=total)

            def advance(prompts: int) -> None:
                progress.advance(bar, prompts)

            rules = find_rules(sharing, tuning, lambda own, part: tuning[part].scores(own, advance))
            contenders: dict[str, Method] = {SAME: method}
            contenders |= {label: shared(sharing, rule) for label, rule in rules.by_label.items()}
            judged = judge(
                contenders, lambda own: held_out.scores(own, advance), self.split.pictures, SAME
            )
            progress.update(bar, completed=total)
        return judged, rules.best

    def _milliseconds(self, methods: Sequence[Method]) -> list[float]:
        """Prefill per prompt, vision tower included: of the plain model and of each method, medians."""
        chosen = timed_batches(self.split.held_out)
        settings = [REFERENCE, *(Setting(str(i), "", own) for i, own in enumerate(methods))]
        inputs = [
            batch.inputs()
            for tasks in chosen
            for batch in prepare(self.model, self.processor, tasks, len(tasks))
        ]
        with (
            threads_of_one(self.options.workers),
            progress_bar(self.options.show_progress) as progress,
        ):
            bar = progress.add_task("timing", total=len(inputs))
            times = prefill_milliseconds(
                self.model, inputs, settings, lambda: progress.advance(bar)
            )
        return [sorted(own)[len(own) // 2] for own in times]

    def _buildable(self) -> list[dict[str, Any]]:
        """The first settings, less those whose values do not go together."""
        return [start for start in self.space.starts() if _builds(self.space, start)]


def _builds(space: Space, candidate: dict[str, Any]) -> bool:
    try:
        space.build(candidate)
    except ValueError:
        return False
    return True


def _claim(
    model: Any, prompts: Sequence[Task], space: Space, directory: Path, options: Options
) -> None:
    """Take the folder; refuse that of another search."""
    asking = Asking(batch_size=options.batch_size, model_name=options.model_name)
    decides = {
        **decide_answers(model, prompts, asking, options.new_tokens),
        "budget": repr(space.budget),
        "seed": options.seed,
        "searched": {name: repr(own) for name, own in space.dimensions.items()},
        "fleet": options.fleet,
    }
    claim(directory, decides, {"command": options.command}, "search")
