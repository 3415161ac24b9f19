"""What one prefill leaves on the host: small numbers, from which samples and totals are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ..trace import Prefilled

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
    """

    def __init__(self, prefilled: Prefilled):
        layout, state, cuts = prefilled.layout, prefilled.state, prefilled.cuts
        self.real = layout.real[:, : layout.length]
        self.visual = layout.visual[:, : layout.length] & self.real
        self.num_visual, self.num_text = layout.num_visual, layout.num_text
        self.columns = layout.real.shape[1]
        self.cost, self.layers = state.shape.cost, state.shape.num_layers
        self.schedule, self.information = state.schedule, state.mutual_information
        self.cuts = [(cut.layer, list(cut.counts), cut.width, cut.packed) for cut in cuts]
        self.observed, self.looked = dict(prefilled.observed), dict(prefilled.looked)
        self.sharing = prefilled.sharing
        self._widths = [cut.visual.shape[1] for cut in cuts]
        self._copy: Copy | None = Copy([cut.visual for cut in cuts], max(self.num_visual))
        self._indices: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.num_visual)

    @property
    def is_here(self) -> bool:
        """Whether `settle` waits for nothing."""
        return self._copy is None or self._copy.is_here

    def settle(self) -> None:
        """Have everything on the host."""
        if self._copy is not None:
            self._indices, self._copy = self._copy.read(), None

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
        assert self._indices is not None
        most, ends = max(self.num_visual), [*(layer for layer, *_ in self.cuts), self.layers]
        # A column more takes what padding and merged tokens hold.
        depths = np.zeros((len(self), most + 1), dtype=np.int16)
        depths[:] = ends[0]
        sizes = [len(self) * width for width in self._widths]
        parts = np.split(self._indices, np.cumsum(sizes)[:-1]) if sizes else []
        for part, width, end in zip(parts, self._widths, ends[1:], strict=True):
            index = part.reshape(len(self), width)
            index = np.where(index < 0, most, index).astype(np.int64)
            np.put_along_axis(depths, index, end, axis=1)
        return depths[:, :most]

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
        observed, looked = (
            [by_layer.get(layer, 0) / len(self) for layer in range(self.layers)]
            for by_layer in (self.observed, self.looked)
        )
        peaks = self.cost.peak_bytes(
            self._computed_columns(),
            num_visual=self.columns,
            observed=observed,
            sharing=self.sharing,
            cached=self._cached_columns(),
            looked=looked,
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


@dataclass
class Totals:
    """Sums over prompts, exact however many they are.

    tokens: mean visual tokens per layer. information, measured: bits, of so many prompts. Both, like
    `visual`, over the prompts that hold a picture.
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

    @classmethod
    def of(cls, record: Record) -> Totals:
        bits = record.information if record.information is not None else []
        measured = [
            Fraction(b)
            for b, n in zip(bits, record.num_visual, strict=False)
            if n and b is not None and math.isfinite(b)
        ]
        pictures = np.array(record.num_visual) > 0
        (flops, kv_bytes), (flops_full, kv_bytes_full) = record.spent, record.plain
        return cls(
            prompts=len(record),
            with_images=int(pictures.sum()),
            visual=sum(record.num_visual),
            tokens=Fraction(int(record.counts[pictures].sum()), record.layers),
            information=sum(measured, Fraction(0)),
            measured=len(measured),
            flops=_sum(flops),
            flops_full=_sum(flops_full),
            kv_bytes=_sum(kv_bytes),
            kv_bytes_full=_sum(kv_bytes_full),
        )

    def __add__(self, other: Totals) -> Totals:
        names = [part.name for part in fields(self)]
        return Totals(**{name: getattr(self, name) + getattr(other, name) for name in names})


def _sum(values: Ints) -> int:
    """Of numbers whose sum may be more than 64 bits hold."""
    return sum(values.tolist())
