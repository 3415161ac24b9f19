"""The search: optuna proposes settings, each is asked the prompts in parts, and bad ones stop early."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.answering import Refused
from ..methods.base import Method
from .agreement import Scores
from .space import Candidate, Space

if TYPE_CHECKING:
    import optuna

Ask = Callable[[Method, int], Scores]
"""What a method scores on one part of the prompts. Raises Refused where it cannot run."""

SHARES = ((0,), (1,), (2, 3))
"""The parts that a trial is asked before it may stop: a quarter of the prompts, another one, and the rest."""
NEVER_STOPPED = 5
"""Trials that run to their end before any is stopped."""
PROPOSALS = 20
"""How often settings are proposed until some are new, the second half of them by chance."""
_SEEDS = 100_003
"""Seeds of one search do not meet those of the next."""
_AGAIN = 1_000_003
"""Nor do those of a further proposal."""


@dataclass(frozen=True)
class Trial:
    """One set of settings that was tried.

    state: "complete", "stopped" (worse than the median at a share of the prompts) or "refused".
    value: what is maximised, `Scores.value`, over the prompts that were asked; None if refused.
    agreement, divergence, entering, flops_share, milliseconds: means over these prompts.
    """

    number: int
    candidate: Candidate
    state: str
    prompts: int = 0
    value: float | None = None
    agreement: float | None = None
    divergence: float | None = None
    entering: float | None = None
    flops_share: float | None = None
    milliseconds: float | None = None
    reason: str = ""


def check_optuna() -> Any:
    """optuna, or an ImportError that says how to get it."""
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "tuning needs optuna, which is not installed: pip install 'autoprune[tune]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


class Search:
    """A study in a file, which the same settings continue.

    What a trial proposes depends on the seed and on the trials before it only, so that a search which was
    killed goes on to the result it would have had.

    Args:
        path: of the study's SQLite file.
        ask: scores a method on a part of the prompts.
    """

    def __init__(self, space: Space, ask: Ask, path: Path, seed: int) -> None:
        optuna = check_optuna()
        self._optuna, self._space, self._ask, self._seed = optuna, space, ask, seed
        # A trial takes many small steps. They are made in memory, and the file gets it when it is over.
        self._saved: Any = optuna.create_study(
            storage=f"sqlite:///{path}",
            study_name="autoprune",
            direction="maximize",
            load_if_exists=True,
        )
        self._study: Any = optuna.create_study(
            direction="maximize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=NEVER_STOPPED),
        )
        self._study.add_trials(self._saved.trials)
        self._starts = space.starts()

    def run(self, trials: int, done: Callable[[Trial], None] = lambda trial: None) -> None:
        """Try settings until there are so many trials; `done` is told of each, earlier ones included."""
        for trial in self.trials:
            done(trial)
        for number in range(len(self.trials), trials):
            done(self._try(number))

    @property
    def trials(self) -> list[Trial]:
        """Those that are over, in their order."""
        return [Trial(**trial.user_attrs["trial"]) for trial in self._saved.trials]

    @property
    def best(self) -> Trial:
        """The best of those that were asked all prompts; the first of equal ones.

        Raises:
            Refused: no trial could run.
        """
        complete = [trial for trial in self.trials if trial.state == "complete"]
        if not complete:
            reason = next((trial.reason for trial in self.trials), "no trial was made")
            raise Refused(f"no settings can run on this model at this budget; the first: {reason}")
        return max(complete, key=lambda trial: trial.value or -math.inf)

    def _propose(self, number: int) -> tuple[optuna.Trial, Candidate]:
        """Settings to try: others than before, as long as some are found."""
        samplers, seed = self._optuna.samplers, _SEEDS * self._seed + number
        tried = [trial.candidate for trial in self.trials]
        if number < len(self._starts):
            self._study.enqueue_trial(dict(self._starts[number]))
        for attempt in range(PROPOSALS):
            guided = attempt < PROPOSALS // 2
            self._study.sampler = (
                samplers.TPESampler(seed=seed + _AGAIN * attempt, multivariate=True, group=True)
                if guided
                else samplers.RandomSampler(seed=seed + _AGAIN * attempt)
            )
            proposed = self._study.ask()
            candidate = self._space.suggest(proposed)
            if candidate not in tried or attempt == PROPOSALS - 1:
                break
            # The sampler does not learn from it.
            self._study.tell(proposed, state=self._optuna.trial.TrialState.FAIL)
        return proposed, candidate

    def _try(self, number: int) -> Trial:
        optuna = self._optuna
        proposed, candidate = self._propose(number)
        trial = self._examine(number, proposed, candidate)
        proposed.set_user_attr("trial", vars(trial))
        if trial.state == "complete":
            self._study.tell(proposed, trial.value)
        else:
            self._study.tell(proposed, state=optuna.trial.TrialState.PRUNED)
        self._saved.add_trial(self._study.trials[-1])
        return trial

    def _examine(self, number: int, proposed: optuna.Trial, candidate: Candidate) -> Trial:
        """Ask the parts of the prompts until the trial falls behind the others."""
        found: list[Scores] = []
        try:
            method = self._space.build(candidate)
            for parts in SHARES:
                found += [self._ask(method, part) for part in parts]
                so_far = Scores.join(found)
                proposed.report(so_far.value, len(found))
                if parts is not SHARES[-1] and proposed.should_prune():
                    return _trial(number, candidate, "stopped", so_far)
        except (Refused, ValueError) as error:
            return Trial(number, candidate, "refused", reason=str(error))
        return _trial(number, candidate, "complete", so_far)


def _trial(number: int, candidate: Candidate, state: str, scores: Scores) -> Trial:
    means: dict[str, Any] = {name: float(own.mean()) for name, own in vars(scores).items()}
    return Trial(number, candidate, state, len(scores.agreement), scores.value, **means)
