"""The record of what happened to each prompt: what pictures, reports and tests read."""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from functools import reduce
from numbers import Integral
from operator import add
from typing import Any, Protocol, overload

import numpy as np
import torch

from .files import write_whole

# Prefills whose numbers may be on their way from the device at one time.
WAITING = 16


class Kept(Sequence[torch.Tensor]):
    """For each layer, which of a prompt's N visual tokens enter it: LongTensor, ascending.

    Args:
        depths: int [N], how many layers each of them enters.
        layers: L.
    """

    def __init__(self, depths: np.ndarray, layers: int):
        self._depths, self._layers = depths, range(layers)

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, layer: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, layer: slice) -> list[torch.Tensor]: ...
    def __getitem__(self, layer: int | slice) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(layer, slice):
            return [self[each] for each in self._layers[layer]]
        return torch.from_numpy(np.flatnonzero(self._depths > self._layers[layer]))

    def __repr__(self) -> str:
        return f"<which of {len(self._depths)} visual tokens enter each of {len(self)} layers>"


@dataclass(repr=False)
class Sample:
    """One prompt.

    Attributes:
        num_visual: N, visual tokens in the prompt; num_text: the other tokens, padding excluded.
        visual_positions: LongTensor [N], their positions in the prompt without padding.
        tokens_per_layer: n_l for each layer, visual tokens entering it, merged ones included.
        kept: for each layer, LongTensor of the original visual tokens (0..N-1, ascending) entering it;
            made when it is asked for.
        mutual_information: bits; None where the method measures none or the prompt has no picture.
        schedule: the planned n_l; None if the method plans none.
        decision: what the method decided by the device's speed, and why, in a sentence; None if it did not.
        summary_token: which visual token the summary of the dropped ones took the place of (`SummaryToken`);
            `kept` lists it. Entering layer l it stands for N - n_l + 1 tokens. None where there is no summary.
            Where a prompt ends with its picture and keeps a single token, that is its last one, and not the
            summary.
        flops, flops_full: decoder prefill, pruned and plain. kv_bytes, kv_bytes_full: cache after it.
        flops_ahead: what comes on top of `flops` where a method looks at the attention of layers ahead of
            their turn. No budget counts it; `Summary.flops_saved` does.
        kv_bytes_held: this prompt's part of what the cache of its batch really holds: a batch pads every
            layer to its longest prompt. Over a batch they sum to the bytes of a growing cache without
            sliding windows; draft tokens that came with a prompt count.
        peak_bytes, peak_bytes_full: most memory that the prefill takes at one time for this prompt
            (`DecoderCost.peak_bytes`), what the method keeps to decide and its batch's padding included.
        pictures: visual tokens of each picture of the prompt, in their order.
    """

    num_visual: int
    num_text: int
    visual_positions: torch.Tensor
    tokens_per_layer: list[int]
    kept: Sequence[torch.Tensor]
    mutual_information: float | None
    schedule: list[int] | None
    flops: float
    flops_full: float
    kv_bytes: int
    kv_bytes_full: int
    kv_bytes_held: int = 0
    peak_bytes: int = 0
    peak_bytes_full: int = 0
    flops_ahead: float = 0.0
    decision: str | None = None
    summary_token: int | None = None
    pictures: list[int] = field(default_factory=list)

    def kept_by_picture(self, layer: int) -> list[int]:
        """How many tokens of each picture enter a layer; merged ones are of none."""
        ends = torch.tensor(self.pictures, dtype=torch.long).cumsum(0)
        number = torch.searchsorted(ends, self.kept[layer], right=True)
        counts: list[int] = number.bincount(minlength=len(self.pictures)).tolist()
        return counts

    @property
    def total_flops(self) -> float:
        """`flops` with those of looks ahead."""
        return self.flops + self.flops_ahead

    @property
    def mean_tokens(self) -> float:
        """The budget that was spent: mean over the layers of the visual tokens entering them."""
        return sum(self.tokens_per_layer) / len(self.tokens_per_layer)

    def __repr__(self) -> str:
        text = f"<Sample of {self.num_visual} visual and {self.num_text} other tokens"
        if not self.num_visual:
            return f"{text}>"
        layers = len(self.tokens_per_layer)
        text += f": {self.mean_tokens:.1f} visual tokens per layer ({_steps(self.tokens_per_layer)}"
        text += f" in {layers} layers)"
        if self.mutual_information is not None:
            text += f", {self.mutual_information:.3f} bits"
        return f"{text}>"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields["visual_positions"] = self.visual_positions.tolist()
        fields["kept"] = [kept.tolist() for kept in self.kept]
        return fields


@dataclass(frozen=True)
class Summary:
    """Means over the prompts that hold a picture, and shares of what all of them would have cost."""

    prompts: int
    prompts_with_images: int
    visual_tokens: float
    mean_tokens: float
    mutual_information: float | None
    flops_saved: float
    kv_bytes_saved: float

    def __str__(self) -> str:
        prompts = "1 prompt" if self.prompts == 1 else f"{self.prompts} prompts"
        text = f"{prompts} ({self.prompts_with_images} with images): "
        text += f"{self.mean_tokens:.1f} of {self.visual_tokens:.1f} visual tokens per layer, "
        text += f"{self.flops_saved:.1%} of prefill FLOPs and {self.kv_bytes_saved:.1%} of KV bytes saved"
        if self.mutual_information is not None:
            text += f", mutual information {self.mutual_information:.3f} bits"
        return text


@dataclass
class Totals:
    """Sums over prompts, exact however many they are.

    tokens: mean visual tokens per layer. information, measured: bits, of so many prompts. Both, like
    `visual`, over the prompts that hold a picture. flops: looks ahead included.
    """

    prompts: int = 0
    with_images: int = 0
    visual: int = 0
    tokens: Fraction = Fraction(0)
    information: Fraction = Fraction(0)
    measured: int = 0
    flops: int = 0
    flops_full: int = 0
    kv_bytes: int = 0
    kv_bytes_full: int = 0

    def __add__(self, other: Totals) -> Totals:
        names = [field.name for field in fields(self)]
        return Totals(**{name: getattr(self, name) + getattr(other, name) for name in names})


class Batch(Protocol):
    """The prompts of one prefill, whose numbers may still be on their way from the device."""

    @property
    def is_here(self) -> bool:
        """Whether `settle` waits for nothing."""

    @property
    def samples(self) -> list[Sample]:
        """One for each prompt."""

    @property
    def totals(self) -> Totals:
        """Sums over the prompts."""

    def __len__(self) -> int:
        """How many prompts there are."""

    def settle(self) -> None:
        """Have everything on the host."""


class Trace:
    """Samples in batch order, one batch after the other.

    Nothing waits for the device while the model runs. What a prefill left is copied from it when it is
    done, and read when somebody asks, or with one of the next prefills.

    Args:
        keep: how many samples are kept, the last ones; None keeps all. `summary` counts every prompt.
        on_sample: called once with each sample, in order, when its numbers have come from the device: on a
            CPU at the end of its prefill, on a GPU with one of the next ones, or when the trace is read or
            its context is left. It runs in the thread that did that; what it raises comes out there.
    """

    def __init__(
        self, keep: int | None = None, on_sample: Callable[[Sample], object] | None = None
    ) -> None:
        if keep is not None and (
            isinstance(keep, bool) or not isinstance(keep, Integral) or keep < 0
        ):
            raise ValueError(
                f"keep must be how many samples a trace keeps, 0 or more, or None for all, got {keep!r}"
            )
        if on_sample is not None and not callable(on_sample):
            raise ValueError(
                f"on_sample must be a function of one sample, got {on_sample!r}; give one such as list.append"
            )
        self.keep, self._on_sample = keep, on_sample
        self._lock = threading.Lock()
        self._waiting: deque[Batch] = deque()
        self._batches: deque[Batch] = deque()
        # Prompts of the batches that are kept, and sums over those that are not.
        self._kept, self._gone = 0, Totals()

    def record(self, batch: Batch) -> None:
        """Called by the engine at the end of each prefill."""
        with self._lock:
            self._waiting.append(batch)
            arrived = self._take_in(everything=False)
        self._tell(arrived)

    def flush(self) -> None:
        """Wait for what is still on its way from the device; called when the context is left."""
        if self._on_sample is not None:
            self._read()

    @property
    def samples(self) -> list[Sample]:
        """One `Sample` per prompt: of all, or of the last `keep`."""
        return self._read()[0]

    @property
    def dropped(self) -> int:
        """How many samples are no longer kept."""
        samples, totals = self._read()
        return totals.prompts - len(samples)

    def __len__(self) -> int:
        """How many samples are kept; `summary().prompts` counts all that there were."""
        return len(self.samples)

    def __repr__(self) -> str:
        samples, totals = self._read()
        dropped = totals.prompts - len(samples)
        kept = f", of which the last {len(samples)} are kept" if dropped else ""
        return f"<Trace of {_summary(totals)}{kept}>"

    def summary(self) -> Summary:
        """What the prompts cost together: all that there were, also those that are no longer kept."""
        return _summary(self._read()[1])

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the summary, every sample that is kept and the number of those that are not to `path`; the
        file appears whole or not at all.
        """
        samples, totals = self._read()
        record = {
            "summary": asdict(_summary(totals)),
            "dropped": totals.prompts - len(samples),
            "samples": [sample.to_dict() for sample in samples],
        }
        write_whole(path, json.dumps(record, indent=1))

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process: the lock, the callback, copies on their way."""
        self._read()
        with self._lock:
            state = self.__dict__ | {"_waiting": deque(), "_batches": self._batches.copy()}
        return state | {"_lock": None, "_on_sample": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_lock": threading.Lock()}

    def _read(self) -> tuple[list[Sample], Totals]:
        """The samples that are kept, and sums over all prompts, as of one moment."""
        with self._lock:
            arrived = self._take_in(everything=True)
            samples = [sample for batch in self._batches for sample in batch.samples]
            totals = reduce(add, (batch.totals for batch in self._batches), self._gone)
        self._tell(arrived)
        return samples if self.keep is None else samples[max(len(samples) - self.keep, 0) :], totals

    def _take_in(self, everything: bool) -> list[Batch]:
        """Take in, in order, the batches that have arrived from the device; wait for everything, or for
        what there is too much of.
        """
        arrived = []
        while self._waiting and (
            everything or len(self._waiting) > WAITING or self._waiting[0].is_here
        ):
            batch = self._waiting.popleft()
            batch.settle()
            arrived.append(batch)
            self._batches.append(batch)
            self._kept += len(batch)
        while self.keep is not None and self._batches:
            fewer = self._kept - len(self._batches[0])
            if fewer < self.keep:
                break
            self._kept = fewer
            self._gone += self._batches.popleft().totals
        return arrived

    def _tell(self, arrived: Sequence[Batch]) -> None:
        """Not under the lock: whoever is told may read the trace."""
        if self._on_sample is not None:
            for batch in arrived:
                for sample in batch.samples:
                    self._on_sample(sample)


def _summary(totals: Totals) -> Summary:
    pictures, measured = max(totals.with_images, 1), totals.measured
    return Summary(
        prompts=totals.prompts,
        prompts_with_images=totals.with_images,
        visual_tokens=totals.visual / pictures,
        mean_tokens=float(totals.tokens / pictures),
        mutual_information=float(totals.information / measured) if measured else None,
        flops_saved=_saved(totals.flops, totals.flops_full),
        kv_bytes_saved=_saved(totals.kv_bytes, totals.kv_bytes_full),
    )


def _saved(spent: int, full: int) -> float:
    return 1.0 - spent / full if full else 0.0


def _steps(counts: Sequence[int]) -> str:
    """The counts of a schedule that falls, shortened in the middle."""
    steps = [n for i, n in enumerate(counts) if not i or n != counts[i - 1]]
    shown = [str(n) for n in steps]
    return ", ".join(shown if len(shown) < 6 else [*shown[:3], "...", shown[-1]])
