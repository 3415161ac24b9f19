"""How long a prefill takes on a device, and so how many cuts pay for themselves there.

A layer takes as long as its FLOPs need, but at least as long as the launch of its kernels. Each cut, and each
ranking of the tokens before a cut, adds a launch time of its own. What a device needs for each of them is
measured elsewhere; here are only numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

TOLERANCE = 0.03
"""Share of the plain prefill's time that finer cuts may cost."""


@dataclass(frozen=True)
class DeviceSpeed:
    """What a device takes for the parts of a prefill.

    Args:
        layer_launch_s: seconds of a decoder layer that has almost nothing to compute.
        cut_launch_s: seconds of a cut: taking the kept tokens out of hidden states, positions and masks.
        ranking_launch_s: seconds of a ranking: looking at the attention and choosing tokens by it.
        flops_per_s: FLOPs per second in a layer of many tokens.

    Raises:
        ValueError: a number is negative or not finite, or the FLOPs per second are 0.
    """

    layer_launch_s: float
    cut_launch_s: float
    ranking_launch_s: float
    flops_per_s: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{field.name} must be finite and 0 or more, got {value!r}")
        if not self.flops_per_s:
            raise ValueError("flops_per_s must be above 0, got 0")


@dataclass(frozen=True)
class Prefill:
    """What the prefill of a batch has to do.

    Args:
        layer_flops: FLOPs of each decoder layer, all prompts together, [L].
        cuts: number of layers that fewer tokens enter than the one before.
        rankings: how often tokens are ranked.
    """

    layer_flops: tuple[float, ...]
    cuts: int = 0
    rankings: int = 0

    def seconds(self, speed: DeviceSpeed) -> float:
        """Predicted: sum_l max(launch, FLOPs_l / rate) + cuts * cut + rankings * ranking."""
        layers = sum(max(speed.layer_launch_s, n / speed.flops_per_s) for n in self.layer_flops)
        return layers + self.cuts * speed.cut_launch_s + self.rankings * speed.ranking_launch_s


@dataclass(frozen=True)
class Decision:
    """How many layers share a cut, or None if nothing is pruned; and why, in one sentence."""

    cut_every: int | None
    reason: str


def choose_cut_every(
    plain: Prefill, choices: Mapping[int, Prefill], speed: DeviceSpeed, must_prune: bool = False
) -> Decision:
    """The finest cuts that are about as fast as the fastest choice, or no cuts if none are.

    Under one budget, coarser cuts are hardly ever predicted slower than finer ones, but finer ones keep more
    of the curve. So the finest choice is taken that is predicted to be slower than the fastest of all, no cuts
    included, by at most 3 % of the plain prefill's time (`TOLERANCE`).

    Args:
        plain: the prefill without pruning.
        choices: the pruned prefill for each `cut_every`.
        must_prune: leaves out the choice of no cuts.
    """
    seconds = {every: choices[every].seconds(speed) for every in sorted(choices)}
    unpruned = plain.seconds(speed)
    fastest = min(seconds.values())
    limit = TOLERANCE * unpruned + (fastest if must_prune else min(fastest, unpruned))
    chosen = next((every for every, needed in seconds.items() if needed <= limit), None)
    if chosen is None:
        return Decision(
            None,
            f"Nothing is pruned: the prefill is predicted to take {_ms(unpruned)} whole, "
            f"and {_ms(fastest)} or more with cuts.",
        )
    return Decision(
        chosen,
        f"{_described(chosen, len(plain.layer_flops))}: the prefill is predicted to take "
        f"{_ms(seconds[chosen])} so, and {_ms(unpruned)} without pruning.",
    )


def _described(cut_every: int, num_layers: int) -> str:
    if cut_every == 1:
        return "Cuts in every layer"
    if cut_every >= num_layers:
        return "One cut for all layers behind the measurement"
    return f"Cuts every {cut_every} layers"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"
