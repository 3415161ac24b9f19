"""How many tokens of a picture a prompt makes room for: what vLLM's processors do, with fewer of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.processing import PromptUpdateDetails

from .server_config import most_positions
from .settings import KEY, Settings

# Of each picture how many tokens stay and how many it has, int64 [pictures, 2].
COUNTS = "autoprune_counts"


@dataclass
class Shortened(PromptUpdateDetails):
    """What stands for a picture in a shortened prompt.

    whole: visual tokens of the whole picture.
    """

    whole: int = 0


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
        return super().apply(inputs, timing_ctx)  # type: ignore[misc]

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> tuple[list[int], Any]:
        ids, placeholders = super()._maybe_apply_prompt_updates(mm_items, mm_res)  # type: ignore[misc]
        updates = mm_res.prompt_updates.get("image", [])
        if updates:
            self._check(ids, [update.content for (update,) in updates])
        return ids, placeholders

    def _check(self, ids: list[int], pictures: Sequence[Shortened]) -> None:
        """Raise ValueError for a prompt that would be answered wrongly."""
        image = self._image_token()
        if ids[-1] == image:
            raise ValueError("autoprune: the prompt ends with a picture; put some text behind it")
        left = sum(picture.full.count(image) for picture in pictures)
        if (given := ids.count(image)) != left:
            raise ValueError(
                f"autoprune: the prompt has {given - left} image tokens that belong to no picture; leave "
                "them out of its text"
            )
        if self.settings.method.positions == "compacted":
            return
        dropped = sum(picture.whole for picture in pictures) - left
        config = self.info.ctx.model_config
        most, last = most_positions(config.hf_config), dropped + config.max_model_len
        if last > most:
            raise ValueError(
                f"autoprune: with whole pictures this prompt could reach position {last}, but the model has "
                f"{most}; send fewer pictures, or start the server with max_model_len {most - dropped} or less"
            )

    def _image_token(self) -> int:
        config = self.info.get_hf_config()
        return getattr(config, "image_token_id", None) or config.image_token_index

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        amount, options = self.settings.for_request(hf_kwargs), _others(hf_kwargs)
        processed = super()._apply_hf_processor_main(mm_items, options)  # type: ignore[misc]
        pictures = mm_items.get_count("image", strict=False)
        if pictures:
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

        def shortened(update: Any) -> Callable[[int], Shortened]:
            def content(picture: int) -> Shortened:
                count = int(out_mm_kwargs["image"][picture][COUNTS].data.flatten()[0])
                return shorten(update.resolve(picture).content, count)

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


def shorten(content: PromptUpdateDetails, count: int) -> Shortened:
    """What stands for a picture, with its first `count` visual tokens alone."""
    visual = _is_visual(content)
    stays = ~visual | (visual.cumsum(0) <= count)
    tokens = [token for token, here in zip(content.full, stays.tolist(), strict=True) if here]
    return Shortened(tokens, content.is_embed, whole=int(visual.sum()))
