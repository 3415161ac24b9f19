"""Compute budgets: how much of what a prompt may cost."""

from __future__ import annotations

import math
import numbers
import reprlib
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["tokens", "ratio", "flops", "kv_bytes"]
Counted = Literal["entering", "leaving"]


@dataclass(frozen=True)
class Budget:
    """How much compute a prompt may use; build it with one of the four constructors.

    Raises:
        ValueError: the value is no number, not finite, not positive, or a share above 1.
    """

    kind: Kind
    value: float
    counted: Counted = "entering"

    def __post_init__(self) -> None:
        if self.kind not in ("tokens", "ratio", "flops", "kv_bytes"):
            raise ValueError(f"kind must be tokens, ratio, flops or kv_bytes, got {self.kind!r}")
        if self.counted not in ("entering", "leaving"):
            raise ValueError(f'counted must be "entering" or "leaving", got {self.counted!r}')
        if self.counted == "leaving" and self.kind != "tokens":
            raise ValueError('counted="leaving" applies to Budget.tokens only')
        object.__setattr__(self, "value", _checked(self.kind, self.value))

    @classmethod
    def tokens(cls, mean: float, counted: Counted = "entering") -> Budget:
        """Mean visual tokens per layer: the counts of all L layers sum to round(L * mean), which
        rounds halves to even like Python's.

        "entering" counts what enters each layer, which is what FLOPs and the KV cache see.
        "leaving" counts what each layer hands on (n_1 .. n_{L-1}, and n_{L-1} once more, as nothing
        is cut after the last layer); what enters layer 0 is not counted. A mean of N or more prunes
        nothing.
        """
        return cls("tokens", mean, counted)

    @classmethod
    def ratio(cls, share: float) -> Budget:
        """Mean visual tokens entering a layer as a share of N, in (0, 1]; the sum is round(L *
        share * N) exactly.
        """
        return cls("ratio", share)

    @classmethod
    def flops(cls, share: float) -> Budget:
        """Share, in (0, 1], of the unpruned decoder's prefill FLOPs, text included
        (`DecoderCost.prefill_flops`).
        """
        return cls("flops", share)

    @classmethod
    def kv_bytes(cls, size: int) -> Budget:
        """Bytes that the keys and values of one prompt may occupy after prefill, text and visual,
        all layers.
        """
        return cls("kv_bytes", size)

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
        if self.kind == "tokens":
            return f"{self.value:g} visual tokens per layer (mean {self.counted})"
        if self.kind == "ratio":
            return f"{100 * self.value:g} % of the visual tokens"
        if self.kind == "flops":
            return f"{100 * self.value:g} % of the prefill FLOPs"
        return f"{self.value:,} bytes of KV cache"

    @property
    def expression(self) -> str:
        """The call that builds this budget, as one would type it."""
        value = f"{self.value:_}" if self.kind == "kv_bytes" else f"{self.value:.10g}"
        leaving = ', counted="leaving"' if self.counted == "leaving" else ""
        return f"Budget.{self.kind}({value}{leaving})"


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
            share = Budget.ratio(asked.value).expression
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
