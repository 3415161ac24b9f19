"""How many tokens of a picture a prompt makes room for: what vLLM's processors do, with fewer of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import PromptUpdateDetails

from .server_config import most_positions
from .settings import KEY, Settings

# Of each picture how many tokens stay and how many it has, int64 [pictures, 2].
COUNTS = "autoprune_counts"


class PrunedInfo:
    """Stands before the information that vLLM has on a family: pictures only, and how large they get."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        limits = super().get_supported_mm_limits()  # type: ignore[misc]
        return {name: limit if name == "image" else 0 for name, limit in limits.items()}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Tokens of a whole picture: a request may ask for more than the server's budget."""
        return {"image": self.get_max_image_tokens()}  # type: ignore[attr-defined]


class PrunedProcessor:
    """Stands before one of vLLM's processors and shortens what stands for a picture in a prompt."""

    info: Any

    @cached_property
    def settings(self) -> Settings:
        return Settings.of(getattr(self.info.get_hf_config(), KEY, {}))

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM makes them, with some text behind the pictures, since no prompt may end with one."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        inputs.prompt = [*inputs.prompt, 0]
        return inputs

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """As vLLM does.

        Raises:
            ValueError: the request's budget is none, or the prompt is one that cannot be pruned.
        """
        # Also where all pictures are known already and nothing else looks at the budget.
        self.settings.for_request(inputs.hf_processor_mm_kwargs)
        result = super().apply(inputs, timing_ctx)  # type: ignore[misc]
        self._check(result)
        return result

    def _check(self, result: Mapping[str, Any]) -> None:
        ids, ranges = result["prompt_token_ids"], result["mm_placeholders"].get("image", [])
        if not ranges:
            return
        length, image = len(ids), self._image_token()
        if ids[-1] == image:
            raise ValueError("autoprune: the prompt ends with a picture; put some text behind it")
        own = sum(place.get_num_embeds() for place in ranges)
        if (given := ids.count(image)) != own:
            raise ValueError(
                f"autoprune: the prompt has {given - own} image tokens that belong to no picture; leave "
                "them out of its text"
            )
        if self.settings.method.positions == "compacted":
            return
        kwargs = result["mm_kwargs"]["image"]
        wholes = [item[COUNTS].data.flatten().tolist() for item in kwargs if item is not None]
        dropped = sum(whole - count for count, whole in wholes)
        config = self.info.ctx.model_config
        most = most_positions(config.hf_config)
        if dropped + config.max_model_len > most:
            raise ValueError(
                f"autoprune: with whole pictures this prompt could reach position "
                f"{dropped + config.max_model_len}, but the model has {most}; send fewer pictures, or lower "
                f"max_model_len to "
                f"{most - dropped} or less (this prompt has {length} tokens)"
            )

    def _image_token(self) -> int:
        config = self.info.get_hf_config()
        return getattr(config, "image_token_id", None) or config.image_token_index

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        amount, options = self.settings.for_request(hf_kwargs), _others(hf_kwargs)
        processed = super()._apply_hf_processor_main(mm_items, options)  # type: ignore[misc]
        pictures = mm_items.get_count("image", strict=False)
        if pictures:
            mm_items.get_items("image", ImageProcessorItems)
            fields = super()._get_mm_fields_config(processed, options)  # type: ignore[misc]
            items = MultiModalKwargsItems.from_hf_inputs(processed, fields)
            updates = super()._get_prompt_updates(mm_items, options, items)  # type: ignore[misc]
            update = next(update for update in updates if update.modality == "image")
            wholes = [int(_is_visual(update.resolve(i).content).sum()) for i in range(pictures)]
            processed[COUNTS] = torch.tensor([[amount.count(n), n] for n in wholes])
        return processed

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, _others(hf_processor_mm_kwargs))  # type: ignore[misc]
        return {**fields, COUNTS: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        options = _others(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, options, out_mm_kwargs)  # type: ignore[misc]

        def shortened(update: Any) -> Callable[[int], PromptUpdateDetails]:
            def content(picture: int) -> PromptUpdateDetails:
                count = int(out_mm_kwargs["image"][picture][COUNTS].data.flatten()[0])
                return _first(update.resolve(picture).content, count)

            return content

        return [
            replace(update, replacement=shortened(update)) if update.modality == "image" else update
            for update in updates
        ]


def _others(options: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is meant for the plugin: the processor of transformers does not know it."""
    return {name: value for name, value in options.items() if name != KEY}


def _is_visual(content: PromptUpdateDetails) -> torch.Tensor:
    """bool [tokens]: which of what stands for a picture are visual tokens."""
    if content.is_embed is None:
        return torch.ones(len(content.full), dtype=torch.bool)
    return content.is_embed(content.full)


def _first(content: PromptUpdateDetails, count: int) -> PromptUpdateDetails:
    """What stands for a picture, with its first `count` visual tokens alone."""
    visual = _is_visual(content)
    stays = ~visual | (visual.cumsum(0) <= count)
    tokens = [token for token, here in zip(content.full, stays.tolist(), strict=True) if here]
    return replace(content, full=tokens)
