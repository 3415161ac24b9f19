"""What the engine reads back from the device: on a GPU every read waits for all that was queued."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import StaticCache

import autoprune
from autoprune import Budget
from tests import zoo

READS = {"cpu", "tolist", "item", "__bool__", "__int__", "__float__", "nonzero", "masked_select"}

# Not any folder of that name: a clone has it too, with its environment inside.
LIBRARY = str(Path(autoprune.__file__).parent)


class Reads(TorchFunctionMode):
    """Counts reads that the library itself makes, by file and function."""

    def __init__(self):
        super().__init__()
        self.places = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        frame = sys._getframe(1)
        place = f"{frame.f_code.co_filename}:{frame.f_code.co_name}"
        name = getattr(function, "__name__", "")
        by_mask = name == "__getitem__" and _is_mask(args[1])
        if place.startswith(LIBRARY) and (name in READS or by_mask):
            self.places[place.rpartition("/")[2]] += 1
        return function(*args, **(kwargs or {}))


def _is_mask(index):
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)


@pytest.mark.parametrize("batch", ["single", "padded3"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("autoprune", {"autoprune.py:_measure": 1}),
        ("fastv", {}),
        ("fastervlm", {}),
        ("divprune", {}),
        ("tome", {}),
        ("turbo", {}),
        ("pdrop", {}),
    ],
)
def test_a_prefill_reads_the_prompt_and_the_information_and_nothing_else(name, expected, batch):
    model = zoo.build("llava", "sdpa")
    inputs = zoo.inputs("llava", model, batch)
    with torch.no_grad(), autoprune.create(name, Budget.ratio(0.5))(model):
        model(**inputs)
        with Reads() as reads:
            tower = model.model.vision_tower
            before_tower = []
            hook = tower.register_forward_pre_hook(
                lambda *_: before_tower.append(dict(reads.places))
            )
            model(**inputs)
            hook.remove()
    # Ids and mask in one read, before anything is queued that it would have to wait for.
    prompt = {"layout.py:on_host": 1}
    assert before_tower == [prompt]
    assert dict(reads.places) == prompt | expected


@pytest.mark.parametrize("over", ["batch", "stream"])
def test_a_shared_budget_reads_no_more_than_one_of_each_prompt(over):
    model = zoo.build("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3")
    fleet = autoprune.Fleet() if over == "stream" else None
    method = autoprune.AutoPrune(Budget.ratio(0.5, over=over), fleet=fleet)
    with torch.no_grad(), method(model), Reads() as reads:
        model(**inputs)
    assert dict(reads.places) == {"layout.py:on_host": 1, "autoprune.py:_measure": 1}


def test_a_static_cache_is_read_before_the_tower_as_well():
    """Whether it is empty, once it has been used."""
    model = zoo.build("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    with torch.no_grad(), autoprune.create("autoprune", Budget.ratio(0.5))(model):
        for length in ({}, {"context.py:_is_filled": 1}):
            with Reads() as reads:
                before_tower = []
                hook = model.model.vision_tower.register_forward_pre_hook(
                    lambda *_, now=before_tower, r=reads: now.append(dict(r.places))
                )
                model(**inputs, past_key_values=cache)
                hook.remove()
            (early,) = before_tower
            assert early == {"layout.py:on_host": 1} | length
            assert dict(reads.places) == early | {"autoprune.py:_measure": 1}
            with Reads() as reads:
                model(input_ids=torch.full((3, 1), 7), past_key_values=cache)
            assert not reads.places
            cache.reset()


def test_decoding_reads_nothing():
    model = zoo.build("llava", "sdpa")
    inputs = zoo.inputs("llava", model, "padded3")
    with torch.no_grad(), autoprune.create("autoprune", Budget.ratio(0.5))(model):
        cache = model(**inputs).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1).long()], dim=1)
        with Reads() as reads:
            model(input_ids=torch.full((3, 1), 7), attention_mask=mask, past_key_values=cache)
    assert not reads.places


def test_several_tokens_on_a_pruned_cache_read_nothing_of_them():
    model = zoo.build("llava", "sdpa")
    inputs = zoo.inputs("llava", model)
    with torch.no_grad(), autoprune.create("autoprune", Budget.ratio(0.5))(model):
        cache = model(**inputs).past_key_values
        with Reads() as reads:
            model(input_ids=torch.full((1, 3), 7), past_key_values=cache)
    assert "layout.py:on_host" not in reads.places
