"""What one prefill leaves on the host: small numbers, from which samples and totals are made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from ..contract import PromptState
from ..trace import Kept, Sample, Totals
from .tokens.cut import Stage
from .tokens.layout import Layout
from .tokens.present import NEW, Tokens
from .tokens.summary import Summaries

Ints = NDArray[np.int64]


class Copy:
    """Device integers on their way to the host, in two bytes each where they fit.

    A GPU copies them when it comes to it, behind what it was given before; nobody waits for that.

    Args:
        parts: LongTensors of any shape and device, behind each other in the copy.
        largest: no number is larger.
    """

    def __init__(self, parts: list[torch.Tensor], largest: int):
        device = parts[0].device if parts else torch.device("cpu")
        dtype = torch.int16 if largest <= torch.iinfo(torch.int16).max else torch.int32
        flat = [part.detach().to(device).flatten() for part in parts]
        self._values = torch.cat(flat).to(dtype) if flat else torch.empty(0, dtype=dtype)
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            there, self._values = (
                self._values,
                torch.empty_like(self._values, device="cpu", pin_memory=True),
            )
            self._values.copy_(there, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(device))

    @property
    def is_here(self) -> bool:
        """Whether reading them waits for nothing."""
        if self._copied is not None:
            return bool(self._copied.query())
        return self._values.device.type == "cpu"

    def read(self) -> np.ndarray:
        """The numbers, after waiting for them if need be."""
        if self._copied is not None:
            self._copied.synchronize()
            # Pinned memory is scarce.
            return self._values.numpy().copy()
        return self._values.numpy(force=True)


class Record:
    """One prefill, with nothing of it left on the device once `settle` was called.

    What follows from the numbers is worked out when somebody asks.

    Args:
        stages: what layers ran on, from the beginning.
        observed, looked: bytes that were kept of a layer's attention, or beside its hidden states, and bytes
            that the look at it took, by layer.
        sharing: see `DecoderCost.peak_bytes`.
        ahead: FLOPs of looks ahead (`Needs.ahead`), of each prompt; None if there were none. ahead_bytes:
            bytes that these took, by layer.
        summaries: the prompts' summary tokens.
    """

    def __init__(
        self,
        layout: Layout,
        state: PromptState,
        stages: Sequence[Stage] = (),
        observed: Mapping[int, int] | None = None,
        looked: Mapping[int, int] | None = None,
        sharing: int = 1,
        ahead: Ints | None = None,
        ahead_bytes: Mapping[int, int] | None = None,
        summaries: Summaries | None = None,
    ):
        self.real = layout.real[:, : layout.length]
        self.visual = layout.visual[:, : layout.length] & self.real
        self.num_visual, self.num_text = layout.num_visual, layout.num_text
        self.columns = layout.real.shape[1]
        self.cost, self.layers = state.shape.cost, state.shape.num_layers
        self.schedule, self.information = state.schedule, state.mutual_information
        self.decision, self.pictures = state.decision, state.prompts.pictures
        self.observed, self.looked = dict(observed or {}), dict(looked or {})
        self.sharing, cuts = sharing, stages[1:]
        self.ahead = np.zeros(len(layout.real), dtype=np.int64) if ahead is None else ahead
        self.ahead_bytes = dict(ahead_bytes or {})
        self.cuts = [
            (cut.first_layer, cut.tokens.counts, cut.tokens.width, cut.packing is not None)
            for cut in cuts
        ]
        parts = [_old_columns(cut.tokens) for cut in cuts]
        self._has_summary = [False] * len(self.num_visual)
        if summaries is not None and summaries.column is not None:
            self._has_summary = (summaries.has | summaries.had).tolist()
            parts.append(summaries.column)
        self._copy: Copy | None = Copy(parts, self.columns)
        self._columns: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.num_visual)

    @property
    def is_here(self) -> bool:
        """Whether `settle` waits for nothing."""
        return self._copy is None or self._copy.is_here

    def settle(self) -> None:
        """Have everything on the host."""
        if self._copy is not None:
            self._columns, self._copy = self._copy.read(), None

    @cached_property
    def counts(self) -> Ints:
        """Visual tokens entering each layer, merged ones included, [batch, L]."""
        counts = np.repeat(np.array(self.num_visual)[:, None], self.layers, axis=1)
        for layer, present, _, _ in self.cuts:
            counts[:, layer:] = np.array(present)[:, None]
        return counts

    def depths(self) -> NDArray[np.int16]:
        """How many layers each visual token of the prompt enters, [batch, most N].

        It says all about who was kept where: a token that was cut does not come back.
        """
        self.settle()
        assert self._columns is not None
        most, ends = max(self.num_visual), [*(layer for layer, *_ in self.cuts), self.layers]
        # A place more takes what holds no visual token of the prompt: text, padding, new tokens.
        index = np.where(self.visual, self.visual.cumsum(axis=1) - 1, most)
        index = np.pad(
            index, ((0, 0), (0, self.columns - index.shape[1] + 1)), constant_values=most
        )
        depths = np.zeros((len(self), most + 1), dtype=np.int16)
        depths[:] = ends[0]
        sizes = [len(self) * width for _, _, width, _ in self.cuts]
        parts = np.split(self._columns, np.cumsum(sizes))[:-1]
        for part, end in zip(parts, ends[1:], strict=True):
            present = np.take_along_axis(index, part.reshape(len(self), -1).astype(np.int64), 1)
            np.put_along_axis(depths, present, end, axis=1)
        return depths[:, :most]

    def summary_tokens(self) -> list[int | None]:
        """Which of its visual tokens each prompt's summary took the place of, [batch]."""
        if not any(self._has_summary):
            return [None] * len(self)
        self.settle()
        assert self._columns is not None
        columns = self._columns[-len(self) :].tolist()
        places = zip(self.visual, columns, self._has_summary, strict=True)
        return [int(visual[:column].sum()) if has else None for visual, column, has in places]

    @cached_property
    def spent(self) -> tuple[Ints, Ints]:
        """FLOPs of the decoder's prefill and bytes of its cache, each [batch]."""
        text = np.array(self.num_text)
        return self.cost.prefill_flops(self.counts, text), self.cost.kv_bytes(self.counts, text)

    @cached_property
    def plain(self) -> tuple[Ints, Ints]:
        """The same of the model that is not pruned."""
        whole = np.repeat(np.array(self.num_visual)[:, None], self.layers, axis=1)
        text = np.array(self.num_text)
        return self.cost.prefill_flops(whole, text), self.cost.kv_bytes(whole, text)

    def held_bytes(self) -> int:
        """A prompt's part of what the cache of this batch holds."""
        return int(self.cost.kv_bytes(self._cached_columns()))

    def peaks(self) -> tuple[Ints, int]:
        """`Sample.peak_bytes` [batch], and `Sample.peak_bytes_full`."""
        observed, looked, ahead = (
            [by_layer.get(layer, 0) / len(self) for layer in range(self.layers)]
            for by_layer in (self.observed, self.looked, self.ahead_bytes)
        )
        peaks = self.cost.peak_bytes(
            self._computed_columns(),
            num_visual=self.columns,
            observed=observed,
            sharing=self.sharing,
            cached=self._cached_columns(),
            looked=looked,
            ahead=ahead,
        )
        plain = self.cost.peak_bytes([self.columns] * self.layers, sharing=self.sharing)
        return peaks, int(plain)

    def _cached_columns(self) -> Ints:
        """Columns that each layer's cache has for a prompt, [L]: padding is cached in every layer."""
        columns = np.full(self.layers, self.columns)
        for layer, _, width, _ in self.cuts:
            columns[layer:] = width
        return columns

    def _computed_columns(self) -> Ints:
        """Columns that each layer computes, [batch, L]: padding, too, where it is not packed."""
        columns = np.repeat(self._cached_columns()[None], len(self), axis=0)
        lengths = self.counts + np.array(self.num_text)[:, None]
        for layer, _, width, packed in self.cuts:
            columns[:, layer:] = lengths[:, layer:] if packed else width
        return columns

    @cached_property
    def samples(self) -> list[Sample]:
        """One for each prompt."""
        depths, counts, information = self.depths(), self.counts.tolist(), self.information
        (flops, kv_bytes), (flops_full, kv_bytes_full) = self.spent, self.plain
        held, (peaks, peak_full) = self.held_bytes(), self.peaks()
        summaries = self.summary_tokens()
        samples = []
        for prompt, (total, text) in enumerate(zip(self.num_visual, self.num_text, strict=True)):
            seen = self.visual[prompt][self.real[prompt]]
            # In a batch of several methods some plan and others do not.
            schedule = self.schedule[prompt] if self.schedule is not None else None
            samples.append(
                Sample(
                    num_visual=total,
                    num_text=text,
                    visual_positions=torch.from_numpy(np.flatnonzero(seen)),
                    tokens_per_layer=counts[prompt],
                    kept=Kept(depths[prompt, :total].copy(), self.layers),
                    mutual_information=(
                        information[prompt] if information is not None and total else None
                    ),
                    schedule=list(schedule) if schedule is not None else None,
                    decision=self.decision if total else None,
                    flops=float(flops[prompt]),
                    flops_full=float(flops_full[prompt]),
                    flops_ahead=float(self.ahead[prompt]),
                    kv_bytes=int(kv_bytes[prompt]),
                    kv_bytes_full=int(kv_bytes_full[prompt]),
                    kv_bytes_held=held,
                    peak_bytes=int(peaks[prompt]),
                    peak_bytes_full=peak_full,
                    summary_token=summaries[prompt],
                    pictures=list(self.pictures[prompt]) if self.pictures else [],
                )
            )
        return samples

    @cached_property
    def totals(self) -> Totals:
        """Sums over the prompts."""
        bits = self.information if self.information is not None else []
        measured = [
            Fraction(b)
            for b, n in zip(bits, self.num_visual, strict=False)
            if n and b is not None and math.isfinite(b)
        ]
        pictures = np.array(self.num_visual) > 0
        (flops, kv_bytes), (flops_full, kv_bytes_full) = self.spent, self.plain
        return Totals(
            prompts=len(self),
            with_images=int(pictures.sum()),
            visual=sum(self.num_visual),
            tokens=Fraction(int(self.counts[pictures].sum()), self.layers),
            information=sum(measured, Fraction(0)),
            measured=len(measured),
            flops=_sum(flops) + _sum(self.ahead),
            flops_full=_sum(flops_full),
            kv_bytes=_sum(kv_bytes),
            kv_bytes_full=_sum(kv_bytes_full),
        )


def _old_columns(tokens: Tokens) -> torch.Tensor:
    """The columns of the tokens that the prompt had, [batch, n]; -1 for padding and for new ones."""
    if tokens.index_with_new is None:
        return tokens.column
    return tokens.column.masked_fill(tokens.index_with_new == NEW, -1)


def _sum(values: Ints) -> int:
    """Of numbers whose sum may be more than 64 bits hold."""
    return sum(values.tolist())
