"""The cells of the results, as the reports and the terminal show them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .results import Row, overspends
from .settings import FULL

HEADINGS = (
    "method", "tokens", "FLOPs", "KV", "accuracy", "of full", "agreement", "difference", "prefill",
)  # fmt: skip


def by_budget(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """The rows of each budget that ran, best first."""
    for budget in dict.fromkeys(row["budget"] for row in rows if row["method"] != FULL):
        group = [row for row in rows if row["budget"] == budget and row["method"] != FULL]
        ran = [row for row in group if row["status"] == "ok"]
        if ran:
            yield budget, sorted(ran, key=lambda row: -row["accuracy"])


def infeasible(rows: Sequence[Row]) -> list[str]:
    """Which settings could not run, one line for each reason."""
    settings: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            settings.setdefault(row["reason"], []).append(f"{row['method']} at {row['budget']}")
    return [f"{', '.join(names)}: {reason}" for reason, names in settings.items()]


def cells(row: Row, brief: bool = False) -> list[str]:
    """A row as a reader wants it, under `HEADINGS`; `brief` leaves out most intervals."""
    return [
        row["method"],
        _figure(row, "tokens_entering", ".4g", brief) + (" (over)" if overspends(row) else ""),
        _figure(row, "flops_share", ".1%", brief),
        _figure(row, "kv_bytes_share", ".1%", brief),
        _figure(row, "accuracy", ".3f"),
        _figure(row, "relative", ".3f", brief),
        _figure(row, "agreement", ".3f", brief),
        _verdict(row, brief),
        _figure(row, "prefill_ms", ".1f", brief, " ms"),
    ]


def setup(config: Mapping[str, Any]) -> Iterator[str]:
    """What ran on what, line by line."""
    yield f"{config['compared']['model']['name']}, {config['machine']}"
    yield f"{config['questions']} questions: " + ", ".join(
        f"{count} {kind}" for kind, count in config["kinds"].items()
    )
    yield ", ".join(f"{name} {version}" for name, version in config["compared"]["version"].items())


def _figure(row: Row, name: str, form: str, brief: bool = False, suffix: str = "") -> str:
    """The value, and its interval unless both bounds read like it."""
    if row[name] is None:
        return "-"
    value, low, high = (
        "" if bound is None else f"{bound:{form}}"
        for bound in (row[name], row[f"{name}_low"], row[f"{name}_high"])
    )
    shown = not brief and low and (low, high) != (value, value)
    return value + suffix + (f" [{low}, {high}]" if shown else "")


def _verdict(row: Row, brief: bool) -> str:
    if row["difference"] is None:
        return "-"
    low, high = row["difference_low"], row["difference_high"]
    if low is None or low <= 0 <= high:
        return _figure(row, "difference", "+.3f", brief)
    bounds = "" if brief else f" [{low:+.3f}, {high:+.3f}]"
    return f"{row['difference']:+.3f}*{bounds}"
