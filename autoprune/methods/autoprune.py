"""AutoPrune: each prompt's mutual information decides how its visual tokens thin out over depth."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from ..contract import (
    ModelShape,
    Needs,
    Observation,
    Positions,
    PromptState,
    Ranking,
    Selection,
    SummaryToken,
)
from ..parts.mergers import MERGERS, as_summary, dpc_knn
from ..parts.scorers import as_shares, text_attention, vision_attention
from ..parts.selectors import relevance_and_diversity
from ..policy.adaptive import CUT_EVERY, AdaptiveSchedule, Sizes, decide_cut_every, falls
from ..policy.budget import Budget
from ..policy.cost import DecoderCost
from ..policy.curves import get_curve
from ..policy.fleet import Fleet
from ..policy.information import mutual_information
from ..policy.schedules import at_depth, check_information, check_size
from ..policy.time_model import Decision, DeviceSpeed
from .any_budget import AnyBudget
from .base import Method, check_settings
from .per_picture import check_number_of_shares, checked_shares, ranked_by_picture
from .per_prompt import PerPrompt, per_prompt
from .sharing import check_fleet, end_booking, other_signals, plan_shared

Ranked = Literal["vision", "text", "text+vision", "text+diversity"]

RANKINGS: dict[str, tuple[Ranked, ...]] = {
    "after_layer_0": ("text+vision", "text", "text+diversity"),
    "pre_llm": ("vision",),
    "peek": ("text", "text+vision", "text+diversity"),
}
"""By what each kind of first cut can rank; the first one is what it ranks by if nothing is said."""


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
        k0: slope without information (the hardest prompt's); stated for 32 layers.
        gamma: how much one bit of information flattens the slope; stated for 32 layers.
        x0: midpoint without information, a layer; stated for 32 layers.
        beta: how many layers one bit of information moves the midpoint; stated for 32 layers.
        curve: retention family, see `autoprune.policy.curves.CURVES`.
        mi_layer: index of the layer whose attention is measured. "peek" measures that of layer 0 ahead of its
            turn, at the look of `first_cut="peek"`. Then I decides all layers, and a budget over a batch or
            a stream can be shared from layer 0 on.
        prior: what the layers up to `mi_layer` follow, whose cuts are made before I is known: "curve", the
            curve of a prompt without information, or "linear", a straight line over depth that spends the
            same budget (1 - l/L in layer l). The authors say that layers without an estimate follow "a
            linear pruning schedule"; that it is this line is our reading.
        cut_every: from the second layer behind the measurement on, cut only every so many layers: the curve
            becomes a staircase of its means, and the budget stays exact. Fewer cuts save time where
            cutting is dear, as on a GPU. The few tokens that rounding leaves over enter the layer before the
            staircase. Where they do not fit, and under budgets of FLOPs or of tokens leaving,
            some steps hold a cut of a single token. "auto" decides at each prefill, by the measured speed of
            the device: the finest cuts that are predicted to be about as fast as the fastest. Where
            every choice is predicted to take 3 % longer than the plain prefill, nothing is pruned (except
            under a budget of bytes, or over a batch or a stream, which is always kept). In `plan`, and for
            a device that was not measured, "auto" is 1.
        rank_every: from the measurement on, rank tokens anew only every so many layers, stated for 32 layers.
            Cuts between follow the last ranking and are planned together, so each is nearly free. 1 ranks at
            every cut, at any depth, and so does `merger="dpc_knn"`.
        first_cut: "after_layer_0"; or before the decoder, which makes budgets feasible that could not even pay
            for layer 0: "pre_llm" ranks by the vision tower alone, "peek" by the text's attention in layer 0,
            looked at ahead of that layer. The look projects the keys of all tokens and the queries of the
            text (all of layer 0's projections where these are joined): 0.3 % of the FLOPs of
            LLaVA-1.5-7B's plain prefill, and about 30 kernels. The trace counts it (`Sample.flops_ahead`), a
            budget does not.
        first_ranking: by what the first cut ranks. "text": the text's attention. "text+vision": the vision
            tower's beside it. "text+diversity": the order in which a determinantal point process picks tokens
            that the text attends to and whose hidden states differ (`selectors.relevance_and_diversity`),
            with 16 kernels for each token that stays. None is "text+vision" after layer 0, "vision" for
            "pre_llm", which has nothing else, and "text" for "peek".
        text_weight: weight of the text's attention against the vision tower's in "text+vision", both
            scaled to sum to 1.
        merger: what becomes of dropped tokens: None discards them. "dpc_knn" recycles the best of those that
            are dropped after the first cut as cluster means, inside the budget. "summary" lets one token stand
            for all of them, inside the budget, or in another form `SummaryToken(...)`.
        positions: "original" rotary positions, or "compacted" to 0, 1, 2, ... in every layer.
        noise: the paper's robustness experiment: each prompt's I is multiplied by 1 + noise u, with u
            uniform in [-1, 1], and the schedule and the trace get the product. In [0, 1].
        seed: which u. It follows from the seed and I to a thousandth of a bit, so that a prompt gets
            the same in every batch.
        fleet: for a budget over a batch or a stream (`Budget.tokens(16, over="batch")`): by which rule it is
            shared, and for a stream its state. None shares a batch by information; a stream needs one. The
            layers up to `mi_layer` follow each prompt's own allowance: none with mi_layer="peek". Copies of a
            prompt, as for beams, get the same schedule and spend as often as they run.
        per_picture: how the tokens of every layer are shared by the pictures of a prompt. None ranks all
            together. "equal" keeps equally many of each; "attention" as the text attends to them, at each
            ranking; numbers are the pictures' shares, in their order. A picture with fewer tokens than its
            quota leaves the rest to the others, and the sum stays exact. A picture is what stands between
            other tokens in the prompt, its tiles together (`engine/tokens/pictures.py`).

    gamma=0 and beta=0 make it a fixed schedule of that curve: I is still measured and recorded, and
    nothing follows from it.

    Raises:
        ValueError: a parameter is out of range.
    """

    name: ClassVar[str] = "autoprune"
    paper: ClassVar[str] = "AutoPrune: Each Complexity Deserves a Pruning Policy, NeurIPS 2025"
    shares_budgets: ClassVar[bool] = True

    budget: AnyBudget = AnyBudget(64)
    k0: float = 0.4
    gamma: float = 0.3
    x0: float = 15.0
    beta: float = 0.3
    curve: str = "logistic"
    mi_layer: int | Literal["peek"] = 1
    prior: Literal["curve", "linear"] = "curve"
    cut_every: int | Literal["auto"] = 1
    rank_every: int = 8
    first_cut: Literal["after_layer_0", "pre_llm", "peek"] = "after_layer_0"
    first_ranking: Ranked | None = None
    text_weight: float = 1.0
    merger: str | SummaryToken | None = None
    positions: Positions = "original"
    noise: float = 0.0
    seed: int = 0
    fleet: Fleet | None = None
    per_picture: Literal["equal", "attention"] | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        object.__setattr__(self, "per_picture", checked_shares(self.per_picture))
        if self.per_picture is not None and self._recycles:
            raise ValueError(
                "merger='dpc_knn' makes tokens of several pictures, so per_picture cannot share them; "
                "leave one of the two out"
            )
        get_curve(self.curve)
        as_summary(self.merger, others=list(MERGERS))
        for name in ("k0", "text_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)!r}")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise must be a share in [0, 1], got {self.noise!r}")
        if self.mi_layer != "peek" and not (_is_whole(self.mi_layer) and self.mi_layer >= 0):
            raise ValueError(
                f'mi_layer must be the index of a layer, 0 or more, or "peek", got {self.mi_layer!r}'
            )
        if self.mi_layer == "peek" and self.first_cut != "peek":
            raise ValueError(
                'mi_layer="peek" measures at the look ahead that first_cut="peek" takes, got '
                f"first_cut={self.first_cut!r}; set that too, or give the index of a layer"
            )
        if self.cut_every != "auto" and not (_is_whole(self.cut_every) and self.cut_every >= 1):
            raise ValueError(
                f'cut_every must be a whole number of layers, 1 or more, or "auto", got {self.cut_every!r}'
            )
        if self.rank_every < 1:
            raise ValueError(
                f"rank_every must be a number of layers, 1 or more, got {self.rank_every!r}"
            )
        for name, allowed in (
            ("prior", ("curve", "linear")),
            ("first_cut", tuple(RANKINGS)),
            ("positions", ("original", "compacted")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        check_fleet(self.budget, self.fleet)
        if self.first_ranking not in (None, *RANKINGS[self.first_cut]):
            raise ValueError(
                f"first_cut={self.first_cut!r} can rank by {' or '.join(map(repr, RANKINGS[self.first_cut]))}, "
                f"got first_ranking={self.first_ranking!r}; leave it out for {RANKINGS[self.first_cut][0]!r}"
            )

    @property
    def _measured(self) -> int:
        """The cut at which information is measured: the one behind `mi_layer`."""
        return 0 if self.mi_layer == "peek" else self.mi_layer + 1

    @property
    def _ranked(self) -> Ranked:
        """By what the first cut ranks."""
        return self.first_ranking or RANKINGS[self.first_cut][0]

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
        """The schedule n_0..n_{L-1} of one prompt, without a model. A budget over a batch or a stream is taken
        as that of this prompt alone.

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
        sizes = Sizes(num_layers, (int(num_visual),), (int(num_text),), cost)
        return self._schedule().after_measuring(sizes, [mutual_information])[0].tolist()

    def capacity(
        self, num_layers: int, num_visual: int, num_text: int = 0, cost: DecoderCost | None = None
    ) -> list[int]:
        """See `Method.capacity`: the plan up to `mi_layer`, behind it at least what any mutual information from
        0 to log2 N bits gives a layer, or all that is left there where a budget is shared over prompts. With
        cut_every="auto" everything may stay, unless the budget is one of bytes or shared.

        Raises:
            InfeasibleBudget: the budget cannot be met; the message names the smallest that can.
        """
        if not num_visual:
            return [0] * num_layers
        sizes = Sizes(num_layers, (num_visual,), (num_text,), cost)
        # What is measured in float32 may exceed the logarithm a little.
        most = (1 + self.noise) * float(np.log2(num_visual)) + 1e-3
        if self.cut_every != "auto":
            return self._schedule().capacity(sizes, most)
        if self.budget.kind == "kv_bytes" or self.budget.over != "prompt":
            choices = [self._schedule(every) for every in (*CUT_EVERY, num_layers)]
            return [max(n) for n in zip(*(s.capacity(sizes, most) for s in choices), strict=True)]
        self._schedule().before_measuring(sizes)
        return [num_visual] * num_layers

    def retention(self, num_layers: int, information: Sequence[float]) -> np.ndarray:
        """The curve before normalisation, [prompts, L], for each prompt's mutual information in bits."""
        return self._schedule().retention(num_layers, information)

    def _schedule(self, cut_every: int | None = None) -> AdaptiveSchedule:
        """How information decides schedules; by default with the setting's `cut_every`, 1 for "auto"."""
        if cut_every is None:
            cut_every = 1 if self.cut_every == "auto" else self.cut_every
        return AdaptiveSchedule(
            budget=self.budget,
            k0=self.k0,
            gamma=self.gamma,
            x0=self.x0,
            beta=self.beta,
            curve=self.curve,
            mi_layer=self._measured - 1,
            prior=self.prior,
            cut_every=cut_every,
            layer_0_is_full=self.first_cut == "after_layer_0",
        )

    def check(self, shape: ModelShape) -> None:
        if self._measured >= shape.num_layers:
            raise ValueError(
                f"mi_layer is {self.mi_layer}, but the model has {shape.num_layers} layers and nothing can "
                f"be cut after the last; choose at most {shape.num_layers - 2}"
            )
        if self.first_cut == "pre_llm" and not shape.has_vision_scores:
            raise ValueError(
                "first_cut='pre_llm' ranks tokens by the vision tower, which gives no scores for this "
                "model (`autoprune families` says why); use first_cut='peek' or 'after_layer_0', or pass "
                "vision_scores"
            )
        if self._recycles and shape.attending is not None:
            raise ValueError(
                "merger='dpc_knn' merges at every cut by the attention of the layer before, and some layers of "
                "this model have none; leave merger out"
            )

    def begin(self, state: PromptState) -> None:
        check_number_of_shares(self.per_picture, state)
        sizes, schedule = _sizes(state), self._schedule()
        if self.cut_every == "auto":
            decision = self._decide(schedule, sizes, state.shape.speed)
            state.decision = decision.reason
            if decision.cut_every is None:
                state.prunes = False
                state.schedule = [[n] * sizes.num_layers for n in sizes.num_visual]
                return
            schedule = self._schedule(decision.cut_every)
        state.notes["adaptive"] = schedule
        self._follow(schedule.before_measuring(sizes), state)

    def _decide(
        self, schedule: AdaptiveSchedule, sizes: Sizes, speed: DeviceSpeed | None
    ) -> Decision:
        if speed is None:
            return Decision(1, "Cuts in every layer: the speed of this device was not measured.")
        return decide_cut_every(schedule, sizes, speed, self._ranking_step(sizes.num_layers))

    def _ranking_step(self, num_layers: int) -> int:
        """`rank_every` in layers of this model."""
        if self.rank_every == 1 or self._recycles:
            return 1
        return at_depth(self.rank_every, num_layers)

    def _window_of(self, cut: int, shape: ModelShape) -> tuple[int, int]:
        """The cuts, from the first to behind the last, that follow one ranking: the same for every prompt."""
        if (attending := shape.attending) is None:
            return self._window(cut, shape.num_layers)
        # Rankings need attention: the cuts behind layers without any follow the ranking before.
        first_text = 1 if self.first_cut == "after_layer_0" else 0
        places = [
            place
            for place in range(shape.num_layers)
            if self._window(place, shape.num_layers)[0] == place
            and (place <= first_text or attending[place - 1])
        ]
        first = max(place for place in places if place <= cut)
        return first, min((place for place in places if place > cut), default=shape.num_layers)

    def _window(self, cut: int, num_layers: int) -> tuple[int, int]:
        """The same where every layer attends."""
        if cut < 2:
            return cut, cut + 1
        measured = max(2, self._measured)
        start, end = (2, measured) if cut < measured else (measured, num_layers)
        step = self._ranking_step(num_layers)
        first = cut - (cut - start) % step
        return first, min(first + step, end)

    @property
    def summary(self) -> SummaryToken | None:
        return as_summary(self.merger, others=list(MERGERS))

    @property
    def _recycles(self) -> bool:
        return self.merger == "dpc_knn"

    @property
    def needs_speed(self) -> bool:
        return self.cut_every == "auto"

    def needs(self, cut: int, state: PromptState) -> Needs | None:
        if not state.prunes:
            return None
        due = state.notes["due"]
        first, until = self._window_of(cut, state.shape)
        ranks = cut == first and any(due[first:until])
        if not (ranks or cut == self._measured):
            return None
        needs = self._first_needs() if self._is_first(cut) else Needs("text", hidden=self._recycles)
        # Who shares a budget looks at the question too.
        shares = cut == self._measured and self.budget.over != "prompt"
        return replace(needs, hidden=True) if shares else needs

    def _is_first(self, cut: int) -> bool:
        return cut == (1 if self.first_cut == "after_layer_0" else 0)

    def _first_needs(self) -> Needs:
        """What the first cut must see."""
        text = self._ranked != "vision"
        return Needs(
            rows="text" if text else None,
            ahead=self.first_cut == "peek",
            vision=self._ranked in ("vision", "text+vision"),
            hidden=self._ranked == "text+diversity",
        )

    def select(self, seen: Observation, state: PromptState) -> Selection | Ranking | None:
        if seen.cut == self._measured:
            bits, others = self._measure(seen)
            measured = [self._disturbed(own) for own in bits]
            information = self._information_for_schedule(measured)
            schedule: AdaptiveSchedule = state.notes["adaptive"]
            if self.budget.over == "prompt":
                plan = schedule.after_measuring(_sizes(state), information)
            else:
                plan = plan_shared(schedule, self.fleet, _sizes(state), information, others, state)
            state.mutual_information = measured
            self._follow(plan, state)
        if self._recycles and seen.cut > 1:
            counts = state.notes["plan"][:, seen.cut].tolist()
            if counts == seen.counts:
                return None
            return dpc_knn(seen, self._scores(seen, state), counts)
        _, until = self._window_of(seen.cut, state.shape)
        scores = self._scores(seen, state)
        if self.per_picture is not None:
            scores = ranked_by_picture(scores, self.per_picture, seen, state)
        return Ranking(scores, until)

    def _measure(self, seen: Observation) -> tuple[list[float], list[list[float]]]:
        """Each prompt's mutual information in bits, and where a budget is shared its `other_signals`."""
        assert seen.attention is not None
        text = None if seen.no_padding else seen.text_mask
        visual = seen.mask if seen.ragged else None
        measured, heads = mutual_information(seen.attention, text, visual), seen.attention.shape[1]
        if self.budget.over != "prompt":
            assert seen.text_hidden is not None
            others = other_signals(seen.attention, seen.text_hidden(), text, visual)
            # One tensor, as each read waits for the device.
            measured = torch.cat((measured, others), dim=1)
        rows = measured.tolist()
        # Attention that overflowed tells nothing; the other prompts of the batch go on.
        bits = [sum(row[:heads]) / heads for row in rows]
        return [x if np.isfinite(x) else 0.0 for x in bits], [row[heads:] for row in rows]

    def end(self, state: PromptState, done: bool) -> None:
        end_booking(self.fleet, state, done)

    def _information_for_schedule(self, measured: list[float]) -> list[float]:
        """The bits that each prompt's schedule follows: what was measured. A benchmark may give others."""
        return measured

    def _follow(self, plan: np.ndarray, state: PromptState) -> None:
        """Take up a plan [prompts, L], and note before which layers it falls for any prompt."""
        state.schedule = plan.tolist()
        state.notes["plan"], state.notes["due"] = plan, falls(plan, state.prompts.num_visual)

    def _disturbed(self, bits: float) -> float:
        draw = random.Random(f"{self.seed} {bits:.3f}").uniform(-1, 1)
        return bits * (1 + self.noise * draw)

    def _scores(self, seen: Observation, state: PromptState) -> torch.Tensor:
        if not self._is_first(seen.cut):
            return text_attention(seen)
        vision = vision_attention(seen) if "vision" in self._ranked else None
        if self._ranked == "vision":
            if vision is None:
                raise ValueError(
                    "first_cut='pre_llm' needs the vision tower's scores, but the picture features were "
                    "not computed inside the context; pass vision_scores, or let the model see the pixels"
                )
            return vision
        text = text_attention(seen)
        if self._ranked == "text+diversity":
            assert seen.hidden is not None
            most = int(state.notes["plan"][:, seen.cut].max())
            return relevance_and_diversity(text, seen.hidden(), most, seen.mask)
        if vision is None:
            return text
        mask = seen.mask if seen.ragged else None
        return as_shares(vision, mask).add(as_shares(text, mask), alpha=self.text_weight)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _sizes(state: PromptState) -> Sizes:
    prompts, shape = state.prompts, state.shape
    visual, text = tuple(prompts.num_visual), tuple(prompts.num_text)
    return Sizes(shape.num_layers, visual, text, shape.cost)
