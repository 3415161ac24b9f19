"""The plugin on other families than the embedded model's, with their own processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from autoprune.evaluation.harness import model as plugin
from autoprune.loading import Loaded
from tests.processors import TOKENS, processor
from tests.zoo import build

from .test_requests import chat, with_documents

SIZES = [(56, 56), (112, 56), (56, 84), (84, 84)]


@pytest.mark.parametrize("family", TOKENS)
def test_a_batch_of_other_families_is_answered_as_alone(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loaded = Loaded(build(family, "sdpa"), processor(family), family)
    monkeypatch.setattr(plugin, "_load", lambda *given: loaded)
    pictures = [Image.effect_noise(size, 90).convert("RGB") for size in SIZES]
    shown = [[picture] for picture in pictures] + [pictures[:2], []]
    options = {"max_new_tokens": 4, "temperature": 0}

    def answers(size: int) -> tuple[list[str], list[dict[str, Any]]]:
        costs = tmp_path / f"{size}.jsonl"
        model = plugin.AutoPruneChat(budget="1/2", batch_size=size, costs=str(costs))
        found = with_documents(model).generate_until(
            [chat(images, "What is on the table ?", options) for images in shown]
        )
        paid = [json.loads(line) for line in costs.read_text().splitlines()]
        return [each.text for each in found], paid

    alone, paid = answers(1)
    together, _ = answers(4)
    assert together == alone
    assert sum(cost["visual"] > 0 for cost in paid) == 5
    for cost in paid:
        # Exactly the budget, in whole tokens of all layers.
        assert cost["entering"] == pytest.approx(cost["visual"] / 2, abs=1)
        assert cost["flops"] <= cost["flops_full"]
