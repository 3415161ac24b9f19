"""Compute budgets: how much of what a prompt may cost, and what a schedule costs.

A schedule is the list n_0..n_{L-1} of visual tokens that enter the L decoder layers. Whoever needs to know
what a budget allows or what a schedule spends of it asks `Budget`.
"""

from __future__ import annotations

import math
import numbers
import reprlib
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from .cost import DecoderCost, int_or_rows

Kind = Literal["tokens", "ratio", "flops", "kv_bytes"]
Counted = Literal["entering", "leaving"]
Over = Literal["prompt", "batch", "stream"]

_DECIMALS = {"tokens": 4, "ratio": 8, "flops": 8}


@dataclass(frozen=True)
class Budget:
    """How much compute a prompt may use; build it with one of the four constructors.

    Rounding: budgets of tokens and ratios allow a whole number of tokens, summed over the layers. It is
    round(L * mean), where halves go to the even number, as Python's `round` does. `AutoPrune` spends that sum
    exactly, so the spent mean may differ from the asked one by up to half a token in one layer, to either
    side: 1.02 tokens in 32 layers are 32.64, and 33 are spent. Methods whose schedule has a fixed shape never
    spend more than that sum. FLOPs and bytes are rounded down and never exceeded.

    Over which prompts it is spent (`over`). Each prompt has an allowance: what it may spend alone (`allowed`).

    * "prompt": every prompt spends its own.
    * "batch": the prompts of one prefill spend the sum of theirs. Tokens and ratios are spent exactly.
      FLOPs and bytes are never exceeded. What is left of them pays for no further token of any prompt.
    * "stream": no prompt spends more than its own and what the finished prompts before it have saved. So
      the sum that is spent is never above the sum that was allowed, after any prompt.

    Prompts without visual tokens take no part: they spend nothing, and what they were allowed is nobody's.

    Raises:
        ValueError: the value is no number, not finite, not positive, or a share above 1; a word that is not
            known, or `counted` and `over` do not go together.
    """

    kind: Kind
    value: float
    counted: Counted = "entering"
    over: Over = "prompt"

    def __post_init__(self) -> None:
        if self.kind not in ("tokens", "ratio", "flops", "kv_bytes"):
            raise ValueError(f"kind must be tokens, ratio, flops or kv_bytes, got {self.kind!r}")
        if self.counted not in ("entering", "leaving"):
            raise ValueError(f'counted must be "entering" or "leaving", got {self.counted!r}')
        if self.counted == "leaving" and self.kind != "tokens":
            raise ValueError('counted="leaving" applies to Budget.tokens only')
        if self.over not in get_args(Over):
            raise ValueError(f'over must be "prompt", "batch" or "stream", got {self.over!r}')
        if self.counted == "leaving" and self.over != "prompt":
            raise ValueError(
                f'counted="leaving" is for the budget of a single prompt, got over={self.over!r}; count tokens '
                "entering"
            )
        object.__setattr__(self, "value", _checked(self.kind, self.value))

    @classmethod
    def tokens(cls, mean: float, counted: Counted = "entering", over: Over = "prompt") -> Budget:
        """Mean visual tokens per layer: the counts of all L layers sum to round(L * mean).

        "entering" counts what enters each layer, which is what FLOPs and the KV cache see.
        "leaving" counts what each layer hands on (n_1 .. n_{L-1}, and n_{L-1} once more, as nothing
        is cut after the last layer); what enters layer 0 is not counted. A mean of N or more prunes
        nothing.
        """
        return cls("tokens", mean, counted, over)

    @classmethod
    def ratio(cls, share: float, over: Over = "prompt") -> Budget:
        """Mean visual tokens entering a layer as a share of N, in (0, 1]: the counts of all L layers sum to
        round(L * share * N).
        """
        return cls("ratio", share, over=over)

    @classmethod
    def flops(cls, share: float, over: Over = "prompt") -> Budget:
        """Share, in (0, 1], of the unpruned decoder's prefill FLOPs, text included
        (`DecoderCost.prefill_flops`).
        """
        return cls("flops", share, over=over)

    @classmethod
    def kv_bytes(cls, size: int, over: Over = "prompt") -> Budget:
        """Bytes that the keys and values of one prompt may occupy after prefill, text and visual,
        all layers.
        """
        return cls("kv_bytes", size, over=over)

    @classmethod
    def of(cls, value: Budget | float, counted: Counted = "entering") -> Budget:
        """A Budget as it is; a number x as `Budget.tokens(x, counted)`.

        Raises:
            ValueError: it is neither, such as a model, which a method is called with.
        """
        if hasattr(value, "forward"):
            raise ValueError(
                f"a method takes its budget first and the model afterwards, got {type(value).__name__} as the "
                "budget; write AutoPrune(budget=64)(model)"
            )
        return value if isinstance(value, Budget) else cls.tokens(value, counted)

    def __str__(self) -> str:
        over = "" if self.over == "prompt" else f", mean over the {self.over}"
        if self.kind == "tokens":
            return f"{self.value:g} visual tokens per layer (mean {self.counted}){over}"
        if self.kind == "ratio":
            return f"{100 * self.value:g} % of the visual tokens{over}"
        if self.kind == "flops":
            return f"{100 * self.value:g} % of the prefill FLOPs{over}"
        return f"{self.value:,} bytes of KV cache{over}"

    @property
    def exact(self) -> bool:
        """Whether it is spent to the token: tokens and ratios.

        FLOPs and bytes are spent up to less than the price of one token in one layer. They depend on the
        decoder's cost and pay for the prompt's text, too.
        """
        return self.kind in ("tokens", "ratio")

    def allowed(
        self,
        num_layers: int,
        num_visual: ArrayLike,
        num_text: ArrayLike = 0,
        cost: DecoderCost | None = None,
    ) -> Any:
        """What a prompt may spend alone: tokens summed over layers, FLOPs or bytes. Never more than unpruned.

        Args:
            num_layers: L.
            num_visual, num_text: N and the other tokens of each prompt, scalars or `[batch]`.
            cost: the decoder's cost, needed for FLOPs and bytes.

        Returns:
            int, or int64 `[batch]`.

        Raises:
            ValueError: `cost` is missing, or of another number of layers.
        """
        visual = np.asarray(num_visual, dtype=np.int64)
        if self.exact:
            full = num_layers * visual
            asked = num_layers * self.value * (visual if self.kind == "ratio" else 1)
            return int_or_rows(np.minimum(np.rint(asked), full).astype(np.int64))
        cost = self._needed(cost, num_layers)
        tokens = visual + np.asarray(num_text, dtype=np.int64)
        if self.kind == "kv_bytes":
            full = num_layers * cost.kv_bytes_per_token * tokens
            return int_or_rows(np.minimum(min(int(self.value), np.iinfo(np.int64).max), full))
        full = np.asarray(num_layers * cost.layer_flops(tokens))
        if self.value == 1:  # the product may lose the last digits
            return int_or_rows(full)
        return int_or_rows(np.minimum(np.floor(self.value * full).astype(np.int64), full))

    def spent(
        self, schedule: ArrayLike, num_text: ArrayLike = 0, cost: DecoderCost | None = None
    ) -> Any:
        """What a schedule costs, in the unit of `allowed`.

        Args:
            schedule: visual tokens entering each layer, `[L]` or `[batch, L]`.
            num_text, cost: as for `allowed`.

        Returns:
            int for `[L]`, int64 `[batch]` for `[batch, L]`.
        """
        counts = np.asarray(schedule, dtype=np.int64)
        if self.exact:
            total = counts.sum(axis=-1)
            if self.counted == "leaving":
                # Layer l hands on n_{l+1}; the last one, behind which nothing is cut, what entered it.
                total = total - counts[..., 0] + counts[..., -1]
            return int_or_rows(total)
        cost = self._needed(cost, counts.shape[-1])
        price = cost.prefill_flops if self.kind == "flops" else cost.kv_bytes
        return price(counts, num_text)

    def smallest_for(
        self,
        schedule: ArrayLike,
        num_visual: ArrayLike,
        num_text: ArrayLike = 0,
        cost: DecoderCost | None = None,
    ) -> Budget:
        """The smallest budget of this kind that pays for every one of these schedules, without the help of
        rounding.

        Means are rounded up in the fourth decimal, shares in the eighth.

        Args:
            schedule: visual tokens entering each layer, `[L]` or `[batch, L]`.
            num_visual, num_text, cost: as for `allowed`.
        """
        counts = np.atleast_2d(np.asarray(schedule, dtype=np.int64))
        layers = counts.shape[1]
        spent = np.maximum(self.spent(counts, num_text, cost), 1)
        if self.kind == "kv_bytes":
            return replace(self, value=int(spent.max()))
        if self.kind == "flops":
            full = replace(self, value=1).allowed(layers, num_visual, num_text, cost)
        else:
            full = layers * (np.asarray(num_visual) if self.kind == "ratio" else 1)
        unit = 10 ** _DECIMALS[self.kind]
        steps = math.ceil((spent / full).max() * unit)
        if self.kind == "tokens":
            return replace(self, value=steps / unit)
        # What is allowed of FLOPs is rounded down.
        while (
            self.kind == "flops" and (np.floor(steps / unit * full) < spent).any() and steps < unit
        ):
            steps += 1
        return replace(self, value=min(1.0, steps / unit))

    def _needed(self, cost: DecoderCost | None, num_layers: int) -> DecoderCost:
        """The cost of a decoder with so many layers, without which FLOPs and bytes mean nothing."""
        if cost is None:
            raise ValueError(
                f"a budget of {self} needs the decoder's cost; "
                "pass cost=DecoderCost.from_config(config)"
            )
        if (differs := cost.differs) is not None:
            raise ValueError(
                f"a budget of {self} is spent over layers that are all alike, but {differs}; give a budget of "
                "tokens or a ratio"
            )
        if cost.layers != num_layers:
            raise ValueError(
                f"cost describes {cost.layers} layers, but the schedule has {num_layers}; "
                "a schedule has one count for each decoder layer"
            )
        return cost

    @property
    def expression(self) -> str:
        """The call that builds this budget, as one would type it."""
        value = f"{self.value:_}" if self.kind == "kv_bytes" else f"{self.value:.10g}"
        leaving = ', counted="leaving"' if self.counted == "leaving" else ""
        over = "" if self.over == "prompt" else f', over="{self.over}"'
        return f"Budget.{self.kind}({value}{leaving}{over})"


class InfeasibleBudget(ValueError):
    """No schedule can meet the budget.

    Attributes:
        asked: the budget that was given.
        smallest: the smallest budget of the same kind that works; None if the asked one is too
            large to be spent.
    """

    def __init__(self, message: str, asked: Budget, smallest: Budget | None = None) -> None:
        super().__init__(message)
        self.asked = asked
        self.smallest = smallest

    @classmethod
    def too_small(
        cls, asked: Budget, smallest: Budget, costs_more: str, way_out: str = ""
    ) -> InfeasibleBudget:
        """The refusal of a budget below the smallest one, which its message leads with.

        Args:
            costs_more: what the budget cannot pay for.
            way_out: what helps beside a larger budget, after "or".
        """
        message = f"the smallest feasible budget here is {smallest.expression}; "
        message += f"{asked} cannot pay for {costs_more}; raise the budget"
        if asked.kind == "tokens" and asked.value <= 1:
            share = Budget.ratio(asked.value, over=asked.over).expression
            message += f", write {share} if a share of the visual tokens is meant"
        return cls(f"{message}, or {way_out}" if way_out else message, asked, smallest)

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is unpickled from its message alone, if nobody says otherwise.
        return type(self), (*self.args, self.asked, self.smallest)


def _checked(kind: Kind, value: Any) -> float:
    """The value as float (int for bytes), or a ValueError that says what is wrong with it."""
    name = f"Budget.{kind}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(
            f"{name} expects a number, got {reprlib.repr(value)} of type {type(value).__name__}"
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} expects a finite number above 0, got {value!r}")
    if kind in ("ratio", "flops") and number > 1:
        raise ValueError(
            f"{name} expects a share in (0, 1], got {value!r}; 1 prunes nothing, "
            "and Budget.tokens takes a number of tokens"
        )
    if kind == "kv_bytes":
        if not number.is_integer():
            raise ValueError(f"{name} expects a whole number of bytes, got {value!r}")
        return int(value)  # type: ignore[call-overload]
    return number
