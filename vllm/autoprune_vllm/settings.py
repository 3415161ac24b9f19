"""What a server and a request may say about pruning."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from autoprune.methods import create
from autoprune.methods.base import PreDecoder
from autoprune.methods.one_picture import check_one_picture

# The name of these settings in `--hf-overrides`, and in `mm_processor_kwargs` of a request.
KEY = "autoprune"


@dataclass(frozen=True)
class Amount:
    """How much of a picture is left: a number of tokens, a share of them, or everything.

    strict: whether more tokens than a picture has are an error. A server's budget is for pictures of every
        size; a request knows its own.
    """

    budget: int | None = None
    ratio: float | None = None
    strict: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any], strict: bool = False) -> Amount:
        """From "budget" or "ratio" among the settings given.

        Raises:
            ValueError: it is neither a whole number, 1 or more, nor a share above 0 and up to 1; or both are.
        """
        budget, ratio = given.get("budget"), given.get("ratio")
        if budget is not None and ratio is not None:
            raise ValueError(
                f"autoprune: give a budget or a ratio, not both; got budget={budget!r} and ratio={ratio!r}"
            )
        if budget is not None and (type(budget) is not int or budget < 1):
            raise ValueError(
                "autoprune: budget must be a whole number of visual tokens per picture, 1 or more, got "
                f"{budget!r}"
            )
        if ratio is not None and not (
            type(ratio) in (int, float) and math.isfinite(ratio) and 0 < ratio <= 1
        ):
            raise ValueError(
                "autoprune: ratio must be the share of a picture's visual tokens that is left, above 0 and at "
                f"most 1, got {ratio!r}"
            )
        return cls(budget, None if ratio is None else float(ratio), strict)

    def count(self, number: int) -> int:
        """How many of a picture's tokens are left.

        Raises:
            ValueError: the budget of a request is more than the picture has.
        """
        if self.ratio is not None:
            return max(1, math.floor(self.ratio * number))
        if self.budget is None:
            return number
        if self.strict and self.budget > number:
            raise ValueError(
                f"autoprune: the budget of {self.budget} visual tokens is more than the picture's {number}; "
                f"give {number} or less, or no budget"
            )
        return min(self.budget, number)


@dataclass(frozen=True)
class Settings:
    """The settings of a server.

    method: which tokens stay.
    amount: how many, where a request says nothing.
    """

    method: PreDecoder
    amount: Amount

    @classmethod
    def of(cls, given: Any) -> Settings:
        """From `{"method": "scope", "budget": 64, "options": {"alpha": 0.5}}`.

        Raises:
            ValueError: a setting is unknown or wrong, or the method cannot work here.
        """
        _check_names(given, ("method", "budget", "ratio", "options"), "--hf-overrides")
        options = given.get("options", {})
        if not isinstance(options, Mapping):
            raise ValueError(
                f'autoprune: options must be a table such as {{"alpha": 0.5}}, got {options!r}'
            )
        method = create(given.get("method", "fastervlm"), 1, **options)
        check_one_picture(method)
        assert isinstance(method, PreDecoder)
        return cls(method, Amount.of(given))

    def for_request(self, processor_options: Mapping[str, Any]) -> Amount:
        """What a request asks for in its `mm_processor_kwargs`; the server's amount if nothing.

        Raises:
            ValueError: what it asks for is no budget.
        """
        given = processor_options.get(KEY)
        if given is None:
            return self.amount
        _check_names(given, ("budget", "ratio"), "mm_processor_kwargs")
        return Amount.of(given, strict=True)


def _check_names(given: Any, known: Collection[str], where: str) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(
            f'autoprune in {where} must be a table such as {{"budget": 64}}, got {given!r}'
        )
    for name in given:
        if name not in known:
            raise ValueError(
                f"autoprune in {where} has no setting {name!r}; it has {', '.join(known)}"
            )
