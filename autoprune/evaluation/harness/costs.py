"""What each answer of a run cost: kept beside the harness's own files, summed up for its results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import UnsupportedError
from ...files import check_file, write_whole
from ...trace import Sample

Cost = dict[str, Any]


def cost_of(sample: Sample, seconds: float, new_tokens: int) -> Cost:
    """The figures of one answer.

    text, visual: tokens of the prompt. entering: mean visual tokens entering a layer. flops, kv_bytes: of
    the decoder's prefill, beside what they are unpruned. seconds: from the pictures to the end of the
    answer, this prompt's share of its batch.
    """
    return {
        "text": sample.num_text,
        "visual": sample.num_visual,
        "entering": sample.mean_tokens,
        "flops": sample.total_flops,
        "flops_full": sample.flops_full,
        "kv_bytes": sample.kv_bytes,
        "kv_bytes_full": sample.kv_bytes_full,
        "mutual_information": sample.mutual_information,
        "seconds": seconds,
        "new_tokens": new_tokens,
    }


def cost_of_rounds(rounds: Sequence[Cost]) -> Cost:
    """The figures of a dialogue: sums of what its rounds cost, means of their visual tokens."""
    summed = ("flops", "flops_full", "kv_bytes", "kv_bytes_full", "seconds", "new_tokens")
    whole = {**rounds[-1], "mutual_information": rounds[0]["mutual_information"]}
    whole |= {name: sum(own[name] for own in rounds) for name in summed}
    means = ("visual", "entering")
    return whole | {name: sum(own[name] for own in rounds) / len(rounds) for name in means}


def summary_of(costs: Sequence[Cost]) -> dict[str, float]:
    """Means over the answers, and shares of the unpruned model's cost; for the harness's results."""
    if not costs:
        return {}
    sums = {name: sum(cost[name] for cost in costs) for name in costs[0] if name in _SUMMED}
    count = len(costs)
    return {
        "visual_tokens": sums["visual"] / count,
        "visual_tokens_entering": sums["entering"] / count,
        "prefill_flops": sums["flops"] / count,
        "prefill_flops_share": sums["flops"] / sums["flops_full"],
        "kv_bytes": sums["kv_bytes"] / count,
        "kv_bytes_share": sums["kv_bytes"] / sums["kv_bytes_full"],
        "seconds_per_answer": sums["seconds"] / count,
    }


_SUMMED = ("visual", "entering", "flops", "flops_full", "kv_bytes", "kv_bytes_full", "seconds")


class CostFile:
    """JSON lines, one for each answer; `path` None keeps nothing.

    Args:
        rank: of several processes each has its own file, with its rank behind the name.

    Raises:
        ValueError: no file can be written there.
    """

    def __init__(self, path: str | None, rank: int = 0):
        self.path = None if path is None else Path(f"{path}.{rank}" if rank else path)
        if self.path is not None:
            check_file(self.path)
            self.path.unlink(missing_ok=True)

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Append what is known of some answers."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Note beside the file why a method cannot run: the harness swallows the error."""
        try:
            yield
        except (ValueError, UnsupportedError) as error:
            if self.path is not None:
                write_whole(self.path.with_name(f"{self.path.name}.refused"), str(error))
            raise


def read_costs(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The records of a run, by task and number of the question; the first where one was asked repeatedly."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    ranks = sorted(path.parent.glob(f"{path.name}.[0-9]*"))
    for file in [path, *ranks] if path.is_file() else ranks:
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            found.setdefault((record["task"], record["doc_id"]), record)
    return found
