"""What is compared: a method with its options under a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..methods.base import Method
from ..methods.no_pruning import NoPruning

FULL = "full"


@dataclass(frozen=True, eq=False)
class Setting:
    """A row of the comparison; `label` and `budget` are how it is called there.

    Where the method itself refuses the budget or its options, `method` is None and `refusal` says why.
    """

    label: str
    budget: str
    method: Method | None
    refusal: str = ""

    @property
    def name(self) -> str:
        """The name of its file of predictions, without the ending."""
        return f"{_plain(self.label)}__{_plain(self.budget)}"


REFERENCE = Setting(FULL, "1", NoPruning())


def with_reference(settings: Sequence[Setting]) -> list[Setting]:
    """The unpruned model, then the settings.

    Raises:
        ValueError: there are none, two of them share a name, or one has the reference's or none.
    """
    if not settings:
        raise ValueError("there is nothing to compare: give at least one method and one budget")
    for setting in settings:
        if not setting.label or setting.label == FULL:
            raise ValueError(
                f"a method is labelled {setting.label!r}; {FULL!r} is the unpruned model: give it another label"
            )
    whole = [REFERENCE, *settings]
    seen: dict[str, Setting] = {}
    for setting in whole:
        # File systems may not tell cases apart.
        other = seen.setdefault(setting.name.casefold(), setting)
        if other is not setting:
            raise ValueError(
                f"{setting.label!r} at {setting.budget!r} and {other.label!r} at {other.budget!r} "
                "would share their file of predictions; give one of them a label of its own"
            )
    return whole


def _plain(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._=+-%" else "-" for c in text)
