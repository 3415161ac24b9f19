"""Prompts with random pictures, in numpy for slow formulations and as an `Observation` for the methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from autoprune.contract import ModelShape, Observation, Prompts, PromptState, Selection
from autoprune.methods.base import PreDecoder

Grid = tuple[int, int]


@dataclass
class Prompt:
    """What is seen of one prompt with N visual tokens: arrays over its tokens, NaN for newlines."""

    hidden: np.ndarray
    text: np.ndarray
    attention: np.ndarray
    received: np.ndarray
    middle: np.ndarray
    keys: np.ndarray
    places: np.ndarray
    padding: np.ndarray

    @property
    def real(self) -> list[int]:
        """Positions of the tokens that show something of the picture."""
        return [
            i
            for i in range(len(self.hidden))
            if not (np.isnan(self.attention[i]) or self.padding[i])
        ]


def prompt(
    *grids: Grid, seed: int = 0, newlines: bool = False, padded_rows: int = 0, size: int = 48
) -> Prompt:
    """A prompt with a picture of each grid (rows, columns), its first rows padding, newlines behind rows."""
    random = np.random.default_rng(seed)
    places, padding = [], []
    for number, (rows, columns) in enumerate(grids):
        for row in range(rows):
            places += [(number, row, column) for column in range(columns)]
            padding += [row < padded_rows] * columns
            if newlines:
                places.append((np.nan,) * 3)
                padding.append(False)
    n = len(places)
    places = np.array(places, dtype=np.float32).reshape(n, 3)
    missing = np.isnan(places[:, 0])
    attention, middle = (random.exponential(size=n).astype(np.float32) / max(n, 1) for _ in "am")
    keys = random.normal(size=(n, 16)).astype(np.float32)
    for values in (attention, middle, keys):
        values[missing] = np.nan
    hidden = random.normal(size=(n, size)).astype(np.float32)
    text = random.normal(size=(random.integers(1, 6), size)).astype(np.float32)
    received = random.exponential(size=n).astype(np.float32) / max(n, 1)
    received[missing] = np.nan
    return Prompt(
        hidden, text, attention, received, middle, keys, places, np.array(padding, dtype=bool)
    )


def observation(prompts: Sequence[Prompt]) -> Observation:
    """What the engine shows of a batch of prompts at cut 0, padded to the longest."""
    rows = {f.name: [torch.from_numpy(getattr(p, f.name)) for p in prompts] for f in fields(Prompt)}

    def stacked(name: str, fill: float = float("nan")) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows[name], batch_first=True, padding_value=fill)

    counts = [len(p.hidden) for p in prompts]
    hidden, text = stacked("hidden", 7.0), stacked("text", 7.0)
    mask = torch.arange(hidden.shape[1]) < torch.tensor(counts)[:, None]
    text_lengths = torch.tensor([len(p.text) for p in prompts])
    return Observation(
        cut=0,
        counts=counts,
        index=torch.arange(hidden.shape[1]).expand(mask.shape).masked_fill(~mask, -1),
        mask=mask,
        text_mask=torch.arange(text.shape[1]) < text_lengths[:, None],
        vision_scores=stacked("attention"),
        vision_padding=stacked("padding", False),
        vision_keys=stacked("keys"),
        vision_received=stacked("received"),
        vision_middle=stacked("middle"),
        places=stacked("places"),
        hidden=lambda: hidden,
        text_hidden=lambda: text,
    )


def state(prompts: Sequence[Prompt], has_cls: bool = True) -> PromptState:
    """What the engine carries along for a batch of prompts."""
    sizes = Prompts([len(p.hidden) for p in prompts], [len(p.text) for p in prompts])
    return PromptState(ModelShape(32, None, has_vision_scores=True, has_cls=has_cls), sizes)


def choices(
    method: PreDecoder, prompts: Sequence[Prompt], counts: Sequence[int], has_cls: bool = True
) -> list[tuple[list[int], np.ndarray | None]]:
    """What the method keeps of each prompt, and the kept tokens' new states if it makes any.

    Every selection is checked to be well formed, and to be the same for each prompt alone.
    """
    together = method.choose(observation(prompts), counts, state(prompts, has_cls))
    assert list(together.counts) == list(counts)
    found = []
    for row, count in enumerate(counts):
        kept, states = _of_row(together, row, count)
        assert kept == sorted(set(kept)) and set(kept) <= set(range(len(prompts[row].hidden)))
        assert (together.kept[row, count:] == -1).all()
        found.append((kept, states))
        if not prompts[row].hidden.size:
            continue  # alone, it would not be asked for
        one = [prompts[row]]
        alone = method.choose(observation(one), [count], state(one, has_cls))
        same, alone_states = _of_row(alone, 0, count)
        assert kept == same
        if states is not None:
            np.testing.assert_allclose(states, alone_states, atol=1e-5)
    return found


def _of_row(selection: Selection, row: int, count: int) -> tuple[list[int], np.ndarray | None]:
    states = selection.states
    return selection.kept[row, :count].tolist(), (
        None if states is None else states[row, :count].numpy()
    )


def cosines(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Cosine of every row of the one with every row of the other, in float64."""
    unit, others = (
        v.astype(np.float64) / np.linalg.norm(v.astype(np.float64), axis=-1, keepdims=True)
        for v in (vectors, others)
    )
    return unit @ others.T


def mixed(seed: int = 0) -> tuple[list[Prompt], list[int]]:
    """A ragged batch and how much to keep of it: newlines, padding, two pictures, none, everything."""
    prompts = [
        prompt((6, 6), seed=seed),
        prompt((3, 5), (4, 4), seed=seed + 1, newlines=True),
        prompt((8, 8), seed=seed + 2, padded_rows=2),
        prompt(seed=seed + 3),
        prompt((2, 3), seed=seed + 4),
        prompt((5, 5), seed=seed + 5, padded_rows=3),
    ]
    return prompts, [9, 11, 20, 0, 6, 14]
