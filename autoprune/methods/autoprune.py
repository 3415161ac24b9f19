"""AutoPrune: each prompt's mutual information decides how its visual tokens thin out over depth."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from ..contract import ModelShape, Needs, Observation, Positions, Prompts, PromptState, Selection
from ..parts.mergers import get_merger
from ..parts.scorers import as_shares, text_attention, vision_attention
from ..policy.adaptive import Staircase
from ..policy.budget import Budget
from ..policy.cost import DecoderCost
from ..policy.curves import get_curve, straight
from ..policy.envelope import envelope
from ..policy.information import mutual_information
from ..policy.shapes import REFERENCE_DEPTH, check_information, check_size
from ..policy.solver import solve_schedule
from .any_budget import AnyBudget
from .base import Method, check_settings
from .per_prompt import PerPrompt, per_prompt

REMEMBERED_PRIORS = 256

# Where `capacity` looks at the curves; more points tighten the bound between them.
POINTS = 65


@dataclass(frozen=True)
class AutoPrune(Method):
    """Complexity-adaptive pruning under an exact budget (AutoPrune, NeurIPS 2025).

    After layer `mi_layer` the mutual information I (bits) between text and visual tokens sets the retention
    curve over depth: slope max(k0 - gamma I, 0), midpoint x0 + beta I. The curve is normalised to the
    budget, which every prompt spends exactly. Easy is a large I, a flat curve: pruned hard from the first
    layers on, then held. Hard is a small I, a steep curve: nearly everything kept early, narrowed late.
    Both cost the same.

    The first cut, after layer 0, ranks tokens by the vision tower's attention plus the text's attention
    (the text's alone where the tower gives no scores); all later cuts rank by the text's attention in the
    layer that just ran. Differs from the released code: see `AutoPruneReference`.

    Args:
        budget: a `Budget`, or the mean number of visual tokens entering a layer.
        k0, gamma: slope without information (the hardest prompt's), and how much one bit flattens it;
            stated for 32 layers.
        x0, beta: midpoint without information, and how far one bit moves it; stated for 32 layers.
        curve: retention family, see `autoprune.policy.curves.CURVES`.
        mi_layer: index of the layer whose attention is measured.
        prior: what the layers up to `mi_layer` follow, whose cuts are made before I is known: "curve", the
            curve of a prompt without information, or "linear", a straight line over depth that spends the
            same budget (1 - l/L in layer l). The authors say that layers without an estimate follow "a
            linear pruning schedule"; that it is this line is our reading.
        cut_every: from the second layer behind the measurement on, cut only every so many layers: the curve
            becomes a staircase of its means, and the budget stays exact. Fewer cuts save time where
            cutting is dear, as on a GPU. The few tokens that rounding leaves over enter the layer before the
            staircase. Where they do not fit, and under budgets of FLOPs or of tokens leaving,
            some steps hold a cut of a single token.
        first_cut: "after_layer_0", or "pre_llm" to rank by the vision tower alone and cut before the
            decoder, which makes budgets feasible that could not even pay for layer 0.
        text_weight: weight of the text's attention against the vision tower's in the first cut, both
            scaled to sum to 1.
        merger: what becomes of dropped tokens after the first cut: None discards them, "dpc_knn"
            recycles the best of them as cluster means, inside the budget.
        positions: "original" rotary positions, or "compacted" to 0, 1, 2, ... in every layer.
        noise: the paper's robustness experiment: each prompt's I is multiplied by 1 + noise u, with u
            uniform in [-1, 1], and the schedule and the trace get the product. In [0, 1].
        seed: which u. It follows from the seed and I to a thousandth of a bit, so that a prompt gets
            the same in every batch.

    gamma=0 and beta=0 make it a fixed schedule of that curve: I is still measured and recorded, and
    nothing follows from it.

    Raises:
        ValueError: a parameter is out of range.
    """

    name: ClassVar[str] = "autoprune"
    paper: ClassVar[str] = "AutoPrune: Each Complexity Deserves a Pruning Policy, NeurIPS 2025"

    budget: AnyBudget = AnyBudget(64)
    k0: float = 0.4
    gamma: float = 0.3
    x0: float = 15.0
    beta: float = 0.3
    curve: str = "logistic"
    mi_layer: int = 1
    prior: Literal["curve", "linear"] = "curve"
    cut_every: int = 1
    first_cut: Literal["after_layer_0", "pre_llm"] = "after_layer_0"
    text_weight: float = 1.0
    merger: str | None = None
    positions: Positions = "original"
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self)
        get_curve(self.curve)
        get_merger(self.merger)
        for name in ("k0", "text_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)!r}")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise must be a share in [0, 1], got {self.noise!r}")
        if self.mi_layer < 0:
            raise ValueError(
                f"mi_layer must be the index of a layer, 0 or more, got {self.mi_layer!r}"
            )
        if self.cut_every < 1:
            raise ValueError(
                f"cut_every must be a number of layers, 1 or more, got {self.cut_every!r}"
            )
        for name, allowed in (
            ("prior", ("curve", "linear")),
            ("first_cut", ("after_layer_0", "pre_llm")),
            ("positions", ("original", "compacted")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")

    @classmethod
    def per_prompt(cls, budgets: Sequence[Budget | float | None], **options: Any) -> PerPrompt:
        """A budget for each prompt of a batch; see `autoprune.per_prompt`.

        Args:
            budgets: in the batch's order; None leaves a prompt whole.
            options: of all prompts, as for `AutoPrune`.

        Raises:
            ValueError: a budget or an option cannot be right.
        """
        if not isinstance(budgets, (list, tuple)):
            raise ValueError(
                f"per_prompt takes a list with one budget for each prompt of the batch, got {budgets!r}"
            )
        return per_prompt([None if b is None else cls(b, **options) for b in budgets])

    def plan(
        self,
        num_layers: int,
        num_visual: int,
        mutual_information: float,
        num_text: int = 0,
        cost: DecoderCost | None = None,
    ) -> list[int]:
        """The schedule n_0..n_{L-1} of one prompt, without a model.

        Args:
            num_layers: L.
            num_visual: N.
            mutual_information: I in bits.
            num_text: other tokens of the prompt; matters for FLOPs and KV budgets only.
            cost: the decoder's cost, for FLOPs and KV budgets.

        Raises:
            InfeasibleBudget: the budget cannot be met; the message names the smallest that can.
            ValueError: a size that is no whole number or too small; information that is negative
                or not finite.
        """
        check_size(num_layers, num_visual, num_text)
        check_information(mutual_information)
        prompts = Prompts([num_visual], [num_text])
        prior = self._prior(num_layers, prompts, cost)
        return self._posterior(num_layers, prompts, cost, prior, [mutual_information])[0].tolist()

    def capacity(
        self, num_layers: int, num_visual: int, num_text: int = 0, cost: DecoderCost | None = None
    ) -> list[int]:
        """See `Method.capacity`: the plan up to `mi_layer`, behind it the envelope of the plans for every
        mutual information from 0 to log2 N bits.

        Raises:
            InfeasibleBudget: the budget cannot be met; the message names the smallest that can.
        """
        if not num_visual:
            return [0] * num_layers
        prior = self._prior(num_layers, Prompts([num_visual], [num_text]), cost)
        slopes, midpoints = self._parameters(num_layers, self._every_information(num_visual))
        room = envelope(
            get_curve(self.curve),
            slopes,
            midpoints,
            num_visual,
            self.budget,
            prior[:, : self.mi_layer + 1],
            num_layers,
            cost,
            num_text,
            transform=self._staircase.average,
        )
        if self._levels:
            before = self._staircase.before(num_layers)
            most = self._staircase.most_left_over(num_layers)
            room[before] = min(room[before] + most, room[before - 1])
        return room

    def _every_information(self, num_visual: int) -> np.ndarray:
        """Ascending points over all mutual information that N visual tokens allow, in bits.

        From where the slope reaches 0 on, the curve stays as it is.
        """
        # What is measured in float32 may exceed the logarithm a little.
        most = (1 + self.noise) * np.log2(num_visual) + 1e-3
        flat = min(self.k0 / self.gamma, most) if self.gamma > 0 else most
        turn = -self.x0 / self.beta if self.beta else 0.0
        return np.unique(np.clip([*np.linspace(0, flat, POINTS), turn, most], 0, most))

    def retention(self, num_layers: int, information: Sequence[float]) -> np.ndarray:
        """The curve before normalisation, [prompts, L], for each prompt's mutual information in bits."""
        slope, midpoint = self._parameters(num_layers, np.asarray(information, dtype=np.float64))
        retained = get_curve(self.curve)(np.arange(num_layers), slope, midpoint)
        return self._staircase.average(retained)

    @property
    def _staircase(self) -> Staircase:
        """Up to the first layer behind the measurement, layers stand alone."""
        return Staircase(self.mi_layer + 2, self.cut_every)

    def _parameters(self, num_layers: int, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slope and midpoint for each mutual information, in layers of this model."""
        slope = np.maximum(self.k0 - self.gamma * bits, 0.0) * (REFERENCE_DEPTH / num_layers)
        midpoint = (self.x0 + self.beta * bits) * (num_layers / REFERENCE_DEPTH)
        return slope, midpoint

    def _prior(self, num_layers: int, prompts: Prompts, cost: DecoderCost | None) -> np.ndarray:
        """The schedule before anything is measured: it decides the layers up to the measurement."""
        priced = self.budget.kind in ("flops", "kv_bytes")
        text = tuple(prompts.num_text) if priced else (0,) * len(prompts)
        return _prior(self, num_layers, tuple(prompts.num_visual), text, cost if priced else None)

    def _posterior(
        self,
        num_layers: int,
        prompts: Prompts,
        cost: DecoderCost | None,
        prior: np.ndarray,
        information: Sequence[float],
    ) -> np.ndarray:
        decided = prior[:, : self.mi_layer + 1]
        return self._solve(self.retention(num_layers, information), prompts, cost, decided)

    def _prior_retention(self, num_layers: int) -> np.ndarray:
        """The curve, [1, L], that decides the layers up to the measurement."""
        if self.prior == "linear":
            return self._staircase.average(straight(num_layers)[None])
        return self.retention(num_layers, [0.0])

    def _solve(
        self,
        retained: np.ndarray,
        prompts: Prompts,
        cost: DecoderCost | None,
        decided: np.ndarray | None,
    ) -> np.ndarray:
        """The schedules [prompts, L] that follow the curves and spend the budget."""
        counts = solve_schedule(
            retained,
            prompts.num_visual,
            self.budget,
            cost=cost,
            num_text=prompts.num_text,
            fixed=decided,
        )
        return self._staircase.level(counts) if self._levels else counts

    @property
    def _levels(self) -> bool:
        """Whether tokens may move between layers, as each costs the same in all of them."""
        even = self.budget.kind != "flops" and self.budget.counted == "entering"
        return self.cut_every > 1 and even

    def check(self, shape: ModelShape) -> None:
        if self.mi_layer >= shape.num_layers - 1:
            raise ValueError(
                f"mi_layer is {self.mi_layer}, but the model has {shape.num_layers} layers and nothing can "
                f"be cut after the last; choose at most {shape.num_layers - 2}"
            )
        if self.first_cut == "pre_llm" and not shape.has_vision_scores:
            raise ValueError(
                "first_cut='pre_llm' ranks tokens by the vision tower, which gives no scores for this "
                "model; use first_cut='after_layer_0' or pass vision_scores"
            )

    def begin(self, state: PromptState) -> None:
        shape = state.shape
        self._follow(self._prior(shape.num_layers, state.prompts, shape.cost), state)

    def needs(self, cut: int, state: PromptState) -> Needs | None:
        due = state.notes["due"][cut]
        if cut == 0:
            return Needs(vision=True) if due else None
        if due or cut == self.mi_layer + 1:
            vision = cut == 1 and self.first_cut == "after_layer_0"
            return Needs(rows="text", vision=vision, hidden=self.merger is not None)
        return None

    def select(self, seen: Observation, state: PromptState) -> Selection | None:
        if seen.cut == self.mi_layer + 1:
            self._measure(seen, state)
        counts = state.notes["plan"][:, seen.cut].tolist()
        if counts == seen.counts:
            return None
        merge = get_merger(self.merger if seen.cut > 1 else None)
        return merge(seen, self._scores(seen), counts)

    def _measure(self, seen: Observation, state: PromptState) -> None:
        assert seen.attention is not None
        per_head = mutual_information(
            seen.attention,
            None if seen.no_padding else seen.text_mask,
            seen.mask if seen.ragged else None,
        )
        # Attention that overflowed tells nothing; the other prompts of the batch go on.
        measured = [x if np.isfinite(x) else 0.0 for x in per_head.mean(dim=1).tolist()]
        bits = [self._disturbed(value) for value in measured]
        shape, prior = state.shape, state.notes["plan"]
        plan = self._posterior(shape.num_layers, state.prompts, shape.cost, prior, bits)
        state.mutual_information = bits
        state.schedule = plan.tolist()
        self._follow(plan, state)

    def _follow(self, plan: np.ndarray, state: PromptState) -> None:
        """Take up a plan [prompts, L], and note before which layers it falls for any prompt."""
        before = np.column_stack([state.prompts.num_visual, plan[:, :-1]])
        state.notes["plan"], state.notes["due"] = plan, (plan < before).any(axis=0).tolist()

    def _disturbed(self, bits: float) -> float:
        draw = random.Random(f"{self.seed} {bits:.3f}").uniform(-1, 1)
        return bits * (1 + self.noise * draw)

    def _scores(self, seen: Observation) -> torch.Tensor:
        if seen.cut == 0:
            scores = vision_attention(seen)
            if scores is None:
                raise ValueError(
                    "first_cut='pre_llm' needs the vision tower's scores, but the picture features were "
                    "not computed inside the context; pass vision_scores, or let the model see the pixels"
                )
            return scores
        text = text_attention(seen)
        vision = vision_attention(seen) if seen.cut == 1 else None
        if vision is None:
            return text
        return as_shares(vision, seen.mask) + self.text_weight * as_shares(text, seen.mask)


@functools.lru_cache(maxsize=REMEMBERED_PRIORS)
def _prior(
    method: AutoPrune,
    num_layers: int,
    num_visual: tuple[int, ...],
    num_text: tuple[int, ...],
    cost: DecoderCost | None,
) -> np.ndarray:
    """The same for all pictures and questions of one size, so it is worth remembering."""
    prompts = Prompts(num_visual, num_text)
    decided = None
    if method.first_cut == "after_layer_0":
        decided = np.asarray(num_visual)[:, None]
    plan = method._solve(method._prior_retention(num_layers), prompts, cost, decided)
    plan.flags.writeable = False
    return plan
