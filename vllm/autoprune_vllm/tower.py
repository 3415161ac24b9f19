"""What a pruning method sees of vLLM's vision tower.

The towers compute attention in `MMEncoderAttention`, which shows no weights. So queries and keys are taken from
its input, in the blocks that matter. What is made of them is the library's own: `Call` computes the attention,
and carries it from patches to visual tokens as the model packs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import MODEL_MAPPING
from vllm.model_executor.layers.attention import MMEncoderAttention

from autoprune.contract import Tower
from autoprune.engine.vision.call import Call
from autoprune.engine.vision.maps import PATCH_LAYOUTS
from autoprune.engine.vision.tower import TowerParts


class TowerTap:
    """Watches a vision tower.

    Args:
        config: the model's configuration, of transformers.
        tower: vLLM's vision tower.
        wanted: what the method must see.
    """

    def __init__(self, config: Any, tower: nn.Module, wanted: Tower):
        blocks = [module for module in tower.modules() if isinstance(module, MMEncoderAttention)]
        deepest = PATCH_LAYOUTS[config.model_type].block(config)
        base = without_weights(config)
        self.parts = TowerParts.of_attentions(base, tower, wanted, blocks[: deepest + 1])
        self._call: Call | None = None
        for module in dict.fromkeys(self.parts.observed):
            module.register_forward_pre_hook(self._observe, with_kwargs=True)

    @contextmanager
    def watch(self, arguments: Mapping[str, Any], wanted: bool = True) -> Iterator[Call]:
        """Watch one run of the tower; `seen` then says what was seen.

        Args:
            arguments: what the model is called with: pixel_values, image_grid_thw, image_sizes.
            wanted: whether anything is to be seen this time.
        """
        call = Call(self.parts, dict(arguments))
        self._call = call if wanted else None
        try:
            yield call
        finally:
            self._call = None

    def seen(self, call: Call) -> dict[str, Tensor]:
        """What was seen of each visual token, [tokens of all pictures, ...], by the names of `Observation`."""
        return call.view("image").values if call.pictures else {}

    def _observe(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._call is None:
            return
        query, key, lengths = _inputs(*args, **kwargs)
        heads = [
            states.view(*states.shape[:2], module.num_heads, module.head_size).transpose(1, 2)
            for states in (query, key)
        ]
        self._call.observe(module, *heads, None, module.scale, cu_seq_lens_q=lengths)


def _inputs(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None = None, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of what `MMEncoderAttention` is called with: queries, keys, and where pictures begin and end."""
    return query, key, cu_seqlens


def without_weights(config: Any) -> nn.Module:
    """The model of transformers that packs such pictures: its code and configuration, and no weights."""
    cls = MODEL_MAPPING[type(config)]
    base = cls.__new__(cls)
    nn.Module.__init__(base)
    base.config = config
    return base


def at(seen: Mapping[str, Tensor], start: int, end: int) -> dict[str, Tensor]:
    """What was seen of the tokens of one picture."""
    return {name: values[start:end] for name, values in seen.items()}
