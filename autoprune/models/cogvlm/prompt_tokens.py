"""Where a picture's tokens are in a prompt, and what follows from it: experts and positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .configuration import CogVLMConfig


@dataclass(frozen=True)
class PictureTokens:
    """The tokens of pictures among those of a batch's prompts, bool [batch, length] each."""

    patch: Tensor
    boi: Tensor
    eoi: Tensor

    @classmethod
    def of(cls, ids: Tensor, config: CogVLMConfig) -> PictureTokens:
        tokens = (config.image_token_id, config.boi_token_id, config.eoi_token_id)
        return cls(*(ids == token for token in tokens))

    @property
    def visual(self) -> Tensor:
        """All that is not text."""
        return self.patch | self.boi | self.eoi

    @property
    def vision_expert(self) -> Tensor:
        """Which tokens go to the vision experts: visual ones before another visual one.

        So boi and the patches do, but eoi goes to the language experts.
        """
        visual = self.visual
        follows = torch.zeros_like(visual)
        follows[:, :-1] = visual[:, 1:]
        return visual & follows

    @property
    def shares(self) -> Tensor:
        """Which tokens have the position of the one before them: the patches but the first."""
        behind = torch.zeros_like(self.patch)
        behind[:, 1:] = self.patch[:, :-1]
        return self.patch & behind

    def fit(self, features: int) -> bool:
        """Whether there are any; compares the prompts with the pictures that came with them.

        Args:
            features: patches of all pictures.

        Raises:
            ValueError: the prompts have places for more or fewer; or one ends inside of a picture, so that
                nothing says which expert its last token goes to.
        """
        open_ended = (self.patch | self.boi)[:, -1].sum()
        counts = [self.patch.sum(), open_ended, self.visual.sum()]
        places, ending, visual = torch.stack(counts).tolist()
        if places != features:
            raise ValueError(
                f"the prompts have places for {places} patches, but {features} came with them; pass the "
                "pixel_values that the processor made with the prompts"
            )
        if ending:
            raise ValueError(
                f"{ending} of the prompts end inside of a picture; give all of a picture's tokens, up to eoi, "
                "in one call"
            )
        return bool(visual)
