"""The tables of `autoprune bench`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]

PREFILL = (
    "tokens", "prefill\nms", "± %", "faster", "by\nFLOPs", "real-\nised", "95 %", "at\nbest", "added\nms",
)  # fmt: skip
BESIDES = (
    "tokens", "vision\nms", "TTFT\nfaster", "decode\nms", "faster", "95 %", "peak\nMB", "KV\nMB", "pad-\nding",
)  # fmt: skip
OVERHEADS = ("prefill\nms", "± %", "of\nplain", "95 %", "decode\nof plain", "95 %")
LAUNCHES = ("tokens", "launches", "of\nplain", "copies")
NAME_WIDTH = 22


def show(record: dict[str, Any], files: Sequence[Path], console: Console) -> None:
    """Print what was measured, and which files hold it."""
    model, machine, rows = record["model"], record["machine"], record["rows"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} thread(s)"
    console.print(f"{model['name']}, {model['dtype']}, {model['attention']}; {where}")
    rounds, asked = _rounds(rows), record["repeats"]
    stopped = f" of {asked}, stopped before the end" if record["interrupted"] else ""
    console.print(f"medians of {rounds} rounds{stopped}, {machine['clock']}")
    console.print()
    speeds = [row for row in rows if row["kind"] != "overhead"]
    console.print(_table("method", PREFILL, speeds, _prefill))
    for line in dict.fromkeys(
        f"{row['variant']} at {row['budget']}: nothing is pruned, prompts have "
        f"{row['visual_tokens']:.4g} visual tokens"
        for row in rows
        if row["kind"] == "pruned" and row["mean_tokens"] == row["visual_tokens"]
    ):
        console.print(line)
    console.print()
    console.print(_table("method", BESIDES, speeds, _besides))
    console.print()
    overheads = [row for row in rows if row["kind"] == "overhead"]
    console.print(_table("overhead", OVERHEADS, overheads, _overhead))
    console.print()
    counted = [row for row in rows if "launches" in row]
    if counted:
        console.print(_table("prefill", LAUNCHES, counted, _launches))
        console.print()
    policy = record["policy_seconds"]
    console.print(
        f"planning (32 layers, 2880 tokens): {1e3 * policy['one_prompt']:.3f} ms for one prompt, "
        f"{1e3 * policy['batch_of_64']:.3f} for 64"
    )
    for path in files:
        console.print(f"written: {path}", soft_wrap=True)


def _rounds(rows: Sequence[Row]) -> int:
    """How often every row was measured, at the least."""
    return min((len(row["seconds"]["prefill"]["all"]) for row in rows), default=0)


def _table(
    what: str, headings: Sequence[str], rows: Sequence[Row], cells: Callable[[Row], list[str]]
) -> Table:
    """Narrow enough for a terminal of 80 characters."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("batch", justify="right", no_wrap=True)
    table.add_column(what, overflow="fold", max_width=NAME_WIDTH)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(str(row["batch"]), _name(row), *cells(row))
    return table


def _name(row: Row) -> str:
    return f"{row['of']}: {row['variant']}" if "of" in row else str(row["variant"])


def _prefill(row: Row) -> list[str]:
    seconds, speedup = row["seconds"]["prefill"], row["speedup"]["prefill"]
    if row["kind"] != "pruned":
        return [_tokens(row), *_milliseconds(seconds), f"{speedup['median']:.2f}", *[""] * 5]
    ideal = row["ideal_speedup"]
    return [
        _tokens(row),
        *_milliseconds(seconds),
        f"{speedup['median']:.2f}",
        f"{ideal:.2f}",
        f"{row['realised_share']:.2f}",
        _interval(speedup, lambda ratio: ratio / ideal, 2),
        f"{row['floor_share']:.2f}" if "floor_share" in row else "",
        f"{1e3 * row['added_seconds']['median']:.3g}" if "added_seconds" in row else "",
    ]


def _besides(row: Row) -> list[str]:
    decode = row["speedup"]["decode"]
    return [
        _tokens(row),
        _milliseconds(row["seconds"]["vision"])[0],
        f"{row['speedup']['ttft']['median']:.2f}",
        _milliseconds(row["seconds"]["decode"])[0],
        f"{decode['median']:.2f}",
        "" if row["kind"] == "plain" else _interval(decode, float, 2),
        f"{row['peak_bytes'] / 1e6:.4g}",
        f"{row['kv_bytes_held'] / 1e6:.4g}",
        f"{row['padding_waste']:.1%}" if row["kind"] == "pruned" else "",
    ]


def _overhead(row: Row) -> list[str]:
    cells = list(_milliseconds(row["seconds"]["prefill"]))
    for phase in ("prefill", "decode"):
        speedup = row["speedup"][phase]
        cells += [f"{1 / speedup['median']:.3f}", _interval(speedup, lambda ratio: 1 / ratio, 3)]
    return cells


def _launches(row: Row) -> list[str]:
    ratio, copies = f"{row['launches_ratio']:.3f}", str(row["copies"])
    return [_tokens(row), str(row["launches"]), ratio, copies]


def _tokens(row: Row) -> str:
    if row["kind"] == "plain" or row["mean_tokens"] == row["visual_tokens"]:
        return "all"
    return f"{row['mean_tokens']:.4g}"


def _interval(ratios: dict[str, Any], change: Callable[[float], float], digits: int) -> str:
    """The bounds between which the median of what `change` makes of the ratios lies."""
    if ratios["interval"] is None:
        return ""
    return "-".join(f"{bound:.{digits}f}" for bound in sorted(map(change, ratios["interval"])))


def _milliseconds(seconds: dict[str, Any]) -> tuple[str, str]:
    """Median, and half the distance between the quartiles in per cent of it."""
    spread = 50 * (seconds["q3"] - seconds["q1"]) / seconds["median"]
    return f"{1e3 * seconds['median']:.4g}", f"{spread:.1f}"
