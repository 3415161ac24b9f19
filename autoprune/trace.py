"""The record of what happened to each prompt: what pictures, reports and tests read."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .files import write_whole

if TYPE_CHECKING:
    from .engine.layout import Layout
    from .engine.prefill import CutRecord
    from .method import PromptState


@dataclass
class Sample:
    """One prompt.

    Attributes:
        num_visual: N, visual tokens in the prompt; num_text: the other tokens, padding excluded.
        visual_positions: LongTensor [N], their positions in the prompt without padding.
        tokens_per_layer: n_l for each layer, visual tokens entering it, merged ones included.
        kept: for each layer, LongTensor of the original visual tokens (0..N-1, ascending) entering it.
        mutual_information: bits; None where the method measures none or the prompt has no picture.
        schedule: the planned n_l; None if the method plans none.
        flops, flops_full: decoder prefill, pruned and plain. kv_bytes, kv_bytes_full: cache after it.
        kv_bytes_held: this prompt's part of what the cache of its batch really holds: a batch pads every
            layer to its longest prompt. Over a batch they sum to the bytes of a growing cache without
            sliding windows; draft tokens that came with a prompt count.
        peak_bytes, peak_bytes_full: most memory that the prefill takes at one time for this prompt
            (`DecoderCost.peak_bytes`), what the method keeps to decide and its batch's padding included.
    """

    num_visual: int
    num_text: int
    visual_positions: torch.Tensor
    tokens_per_layer: list[int]
    kept: list[torch.Tensor]
    mutual_information: float | None
    schedule: list[int] | None
    flops: float
    flops_full: float
    kv_bytes: int
    kv_bytes_full: int
    kv_bytes_held: int = 0
    peak_bytes: int = 0
    peak_bytes_full: int = 0

    @property
    def mean_tokens(self) -> float:
        """The budget that was spent: mean over the layers of the visual tokens entering them."""
        return sum(self.tokens_per_layer) / len(self.tokens_per_layer)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields["visual_positions"] = self.visual_positions.tolist()
        fields["kept"] = [kept.tolist() for kept in self.kept]
        return fields


@dataclass(frozen=True)
class Summary:
    """Means over the samples that hold a picture, and sums of what was saved."""

    prompts: int
    prompts_with_images: int
    visual_tokens: float
    mean_tokens: float
    mutual_information: float | None
    flops_saved: float
    kv_bytes_saved: float

    def __str__(self) -> str:
        text = f"{self.prompts} prompts ({self.prompts_with_images} with images): "
        text += f"{self.mean_tokens:.1f} of {self.visual_tokens:.1f} visual tokens per layer, "
        text += f"{self.flops_saved:.1%} of prefill FLOPs and {self.kv_bytes_saved:.1%} of KV bytes saved"
        if self.mutual_information is not None:
            text += f", mutual information {self.mutual_information:.3f} bits"
        return text


@dataclass(frozen=True)
class Prefilled:
    """What one prefill of a batch left for the trace.

    observed: bytes that were kept of a layer's attention, or beside its hidden states, by layer. sharing: see
        `DecoderCost.peak_bytes`.
    """

    layout: Layout
    state: PromptState
    cuts: Sequence[CutRecord] = ()
    observed: Mapping[int, int] = field(default_factory=dict)
    sharing: int = 1


# Of all traces: a lock of its own would keep a trace from being pickled.
_reading = threading.Lock()


class Trace:
    """Samples in batch order, one batch after the other.

    Tensors are copied from the device when they are first read, not while the model runs.
    """

    def __init__(self) -> None:
        self._batches: list[Prefilled] = []
        self._samples: list[Sample] = []

    def record(self, prefilled: Prefilled) -> None:
        """Called by the engine at the end of each prefill."""
        self._batches.append(prefilled)

    @property
    def samples(self) -> list[Sample]:
        """One `Sample` per prompt."""
        with _reading:
            while self._batches:
                self._samples.extend(_read(self._batches[0]))
                self._batches.pop(0)
        return self._samples

    def __len__(self) -> int:
        return len(self.samples)

    def summary(self) -> Summary:
        """What the prompts cost together."""
        samples = self.samples
        pictures = [s for s in samples if s.num_visual]
        information = [s.mutual_information for s in pictures if s.mutual_information is not None]
        return Summary(
            prompts=len(samples),
            prompts_with_images=len(pictures),
            visual_tokens=_mean([s.num_visual for s in pictures]),
            mean_tokens=_mean([s.mean_tokens for s in pictures]),
            mutual_information=_mean(information) if information else None,
            flops_saved=_saved([s.flops for s in samples], [s.flops_full for s in samples]),
            kv_bytes_saved=_saved(
                [s.kv_bytes for s in samples], [s.kv_bytes_full for s in samples]
            ),
        )

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write every sample and the summary to `path`; the file appears whole or not at all."""
        record = {
            "summary": asdict(self.summary()),
            "samples": [sample.to_dict() for sample in self.samples],
        }
        write_whole(path, json.dumps(record, indent=1))


def _read(prefilled: Prefilled) -> list[Sample]:
    visual = [cut.visual.cpu().numpy() for cut in prefilled.cuts]
    return [_sample(prefilled, visual, p) for p in range(len(prefilled.layout.real))]


def _sample(prefilled: Prefilled, visual: list[np.ndarray], prompt: int) -> Sample:
    layout, state, cuts = prefilled.layout, prefilled.state, prefilled.cuts
    total, text = layout.num_visual[prompt], layout.num_text[prompt]
    counts, kept = [], []
    present, indices = total, torch.arange(total)
    due = {cut.layer: i for i, cut in enumerate(cuts)}
    for layer in range(state.shape.num_layers):
        if layer in due:
            row = visual[due[layer]][prompt]
            present = cuts[due[layer]].counts[prompt]
            indices = torch.from_numpy(np.sort(row[row >= 0]))
        counts.append(present)
        kept.append(indices)
    cost, sharing, columns = state.shape.cost, prefilled.sharing, layout.real.shape[1]
    cached, computed = _columns(prefilled, [count + text for count in counts])
    observed = [prefilled.observed.get(n, 0) / len(layout.real) for n in range(len(counts))]
    real = layout.real[prompt, : layout.length]
    information = state.mutual_information
    # In a batch of several methods some plan and others do not.
    schedule = state.schedule[prompt] if state.schedule is not None else None
    return Sample(
        num_visual=total,
        num_text=text,
        visual_positions=torch.from_numpy(
            np.flatnonzero(layout.visual[prompt, : layout.length][real])
        ),
        tokens_per_layer=counts,
        kept=kept,
        mutual_information=information[prompt] if information is not None and total else None,
        schedule=list(schedule) if schedule is not None else None,
        flops=float(cost.prefill_flops(counts, text)),
        flops_full=float(cost.prefill_flops([total] * len(counts), text)),
        kv_bytes=int(cost.kv_bytes(counts, text)),
        kv_bytes_full=int(cost.kv_bytes([total] * len(counts), text)),
        kv_bytes_held=int(cost.kv_bytes(cached)),
        peak_bytes=int(cost.peak_bytes(computed, 0, columns, observed, sharing, cached)),
        peak_bytes_full=int(cost.peak_bytes([columns] * len(counts), sharing=sharing)),
    )


def _columns(prefilled: Prefilled, lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Of a prompt with so many tokens in each layer: the columns that each layer's cache has for it, and
    those that the layer computes. Padding is cached in every layer, and computed where it is not packed.
    """
    cuts = {cut.layer: cut for cut in prefilled.cuts}
    width, packed = prefilled.layout.real.shape[1], False
    cached, computed = [], []
    for layer, length in enumerate(lengths):
        if layer in cuts:
            width, packed = cuts[layer].width, cuts[layer].packed
        cached.append(width)
        computed.append(length if packed else width)
    return cached, computed


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _saved(spent: list[float] | list[int], full: list[float] | list[int]) -> float:
    return 1.0 - sum(spent) / sum(full) if sum(full) else 0.0
