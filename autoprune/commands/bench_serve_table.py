"""The table of `autoprune bench --serve`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

HEADINGS = (
    "tokens", "requests\n/ s", "tokens\n/ s", "first token\nms", "p95\nms", "answer\nms", "p95\nms",
    "429", "lost",
)  # fmt: skip


def show(record: dict[str, Any], console: Console) -> None:
    """Print what was measured."""
    server = record["server"]
    replicas = f", {server['replicas']} replicas" if server["replicas"] else ""
    console.print(
        f"{server['model']}{replicas}; {record['clients']} clients, {record['requests']} requests a round, "
        f"medians of {record['rounds']} rounds"
    )
    console.print()
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for kind, row in record["rows"].items():
        table.add_row(kind, *_cells(row))
    console.print(table)
    console.print()
    faster = record["pruned_over_plain"]["requests_per_second"]
    share = record["rows"]["pruned"]["flops_share"]
    console.print(
        f"pruned: {faster:.2f} x the requests per second, for {share:.0%} of the prefill's FLOPs"
    )
    memory = server["memory_bytes"]
    known = "not known" if memory is None else f"{memory / 1e6:.4g} MB ({server['memory_is_of']})"
    console.print(f"server's memory: {known}; that of a GPU is not in it")


def _cells(row: dict[str, Any]) -> list[str]:
    first, whole = row["first_token_seconds"], row["request_seconds"]
    times = (first["median"], first["p95"], whole["median"], whole["p95"])
    return [
        f"{row['visual_tokens_per_layer']:.4g}",
        f"{row['requests_per_second']['median']:.3g}",
        f"{row['tokens_per_second']['median']:.3g}",
        *(f"{1e3 * seconds:.4g}" for seconds in times),
        str(row["told_429"]),
        str(len(row["lost"])),
    ]
