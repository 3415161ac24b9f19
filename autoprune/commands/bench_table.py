"""The tables of `autoprune bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HEADINGS = (
    "tokens", "prefill\nms", "\n± %", "prefill\nfaster", "by\nFLOPs", "real-\nised", "at\nbest", "added\nms",
    "TTFT\nfaster", "decode\nfaster", "peak\nMB", "KV\nMB", "pad-\nding",
)  # fmt: skip


def show(record: dict[str, Any], files: Sequence[Path], console: Console) -> None:
    """Print what was measured, and which files hold it."""
    model, machine, rows = record["model"], record["machine"], record["rows"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} thread(s)"
    console.print(f"{model['name']}, {model['dtype']}, {model['attention']}; {where}")
    rounds, asked = _rounds(rows), record["repeats"]
    stopped = f" of {asked}, stopped before the end" if record["interrupted"] else ""
    console.print(f"medians of {rounds} rounds{stopped}, {machine['clock']}")
    console.print()
    console.print(_speeds([row for row in rows if row["kind"] != "overhead"]))
    for line in dict.fromkeys(
        f"{row['variant']} at {row['budget']}: nothing is pruned, prompts have "
        f"{row['visual_tokens']:.4g} visual tokens"
        for row in rows
        if row["kind"] == "pruned" and row["mean_tokens"] == row["visual_tokens"]
    ):
        console.print(line)
    console.print()
    console.print(_overheads([row for row in rows if row["kind"] == "overhead"]))
    console.print()
    policy = record["policy_seconds"]
    console.print(
        f"policy and solver, 32 layers, 2880 visual tokens: {1e3 * policy['one_prompt']:.3f} ms for "
        f"one prompt, {1e3 * policy['batch_of_64']:.3f} ms for 64"
    )
    for path in files:
        console.print(f"written: {path}", soft_wrap=True)


def _rounds(rows: Sequence[dict[str, Any]]) -> int:
    """How often every row was measured, at the least."""
    return min((len(row["seconds"]["prefill"]["all"]) for row in rows), default=0)


def _speeds(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("batch", justify="right", no_wrap=True)
    table.add_column("method", overflow="fold")
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        is_pruned = row["kind"] == "pruned"
        speedup = {phase: f"{row['speedup'][phase]['median']:.2f}" for phase in row["speedup"]}
        table.add_row(
            str(row["batch"]),
            row["variant"],
            f"{row['mean_tokens']:.4g}" if is_pruned else "all",
            *_milliseconds(row["seconds"]["prefill"]),
            speedup["prefill"],
            f"{row['ideal_speedup']:.2f}" if is_pruned else "",
            f"{row['realised_share']:.2f}" if is_pruned else "",
            f"{row['floor_share']:.2f}" if "floor_share" in row else "",
            f"{1e3 * row['added_seconds']['median']:.3g}" if "added_seconds" in row else "",
            speedup["ttft"],
            speedup["decode"],
            f"{row['peak_bytes'] / 1e6:.4g}",
            f"{row['kv_bytes_held'] / 1e6:.4g}",
            f"{row['padding_waste']:.1%}" if is_pruned else "",
        )
    return table


def _overheads(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("batch", justify="right")
    table.add_column("overhead", no_wrap=True)
    for heading in ("prefill ms", "± %", "of plain", "decode of plain"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        shares = (1 / row["speedup"][phase]["median"] for phase in ("prefill", "decode"))
        table.add_row(
            str(row["batch"]),
            row["variant"],
            *_milliseconds(row["seconds"]["prefill"]),
            *(f"{share:.3f}" for share in shares),
        )
    return table


def _milliseconds(seconds: dict[str, Any]) -> tuple[str, str]:
    """Median, and half the distance between the quartiles in per cent of it."""
    spread = 50 * (seconds["q3"] - seconds["q1"]) / seconds["median"]
    return f"{1e3 * seconds['median']:.4g}", f"{spread:.1f}"
