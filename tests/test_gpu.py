"""What only a GPU shows: the CPU's answers there too, no waiting, and decoding as one CUDA graph.

Skipped without one.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import pytest
import torch

import autoprune
from autoprune import AutoPrune, Budget
from autoprune.methods import METHODS
from tests import oracle, zoo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

LIBRARY = str(Path(autoprune.__file__).parent)
FAMILIES = ["llava", "qwen2_5_vl", "internvl", "llava_next", "gemma3"]
BATCHES = ["single", "padded3", "padded3_text"]
# The released schedule has budgets of its own.
NAMES = [name for name in METHODS if name != "autoprune_reference"]
on_cpu = functools.cache(zoo.build)


@functools.cache
def on_gpu(name):
    return zoo.build(name).cuda()


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    """Convolutions use TF32 unless told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def created(name):
    return autoprune.create(name, budget=Budget.ratio(0.5))


def to_gpu(inputs):
    return {name: value.cuda() for name, value in inputs.items()}


def prefill(model, method, inputs):
    """Logits of the last column, and the trace's samples."""
    with torch.no_grad(), method(model) as trace:
        logits = model(**inputs, use_cache=True).logits[:, -1]
    return logits.cpu(), trace.samples


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_prunes_as_the_cpu_does(name, family, batch):
    inputs = zoo.inputs(family, on_cpu(family), batch)
    expected, samples = prefill(on_cpu(family), created(name), inputs)
    actual, same = prefill(on_gpu(family), created(name), to_gpu(inputs))
    for sample, other in zip(samples, same, strict=True):
        assert [kept.tolist() for kept in sample.kept] == [kept.tolist() for kept in other.kept]
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)


class Waits:
    """Places in the library that made the host wait for the GPU."""

    def __enter__(self):
        self._caught = warnings.catch_warnings(record=True)
        self._found = self._caught.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *exception):
        torch.cuda.set_sync_debug_mode("default")
        self._caught.__exit__(*exception)

    @property
    def places(self):
        return [
            f"{Path(each.filename).name}:{each.lineno}"
            for each in self._found
            if "synchronizing" in str(each.message) and each.filename.startswith(LIBRARY)
        ]


@pytest.mark.parametrize("batch", ["single", "padded3"])
@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("autoprune", ["layout.py", "autoprune.py"]),
        ("fastv", ["layout.py"]),
        ("divprune", ["layout.py"]),
        ("random", ["layout.py"]),
        ("tome", ["layout.py"]),
    ],
)
def test_a_prefill_waits_for_the_prompt_and_the_information_and_nothing_else(name, files, batch):
    model = on_gpu("llava")
    inputs = to_gpu(zoo.inputs("llava", model, batch))
    with torch.no_grad(), created(name)(model):
        model(**inputs)
        with Waits() as waits:
            cache = model(**inputs).past_key_values
        assert [place.split(":")[0] for place in waits.places] == files
        mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"][:, -1:]], dim=1)
        token = inputs["input_ids"][:, -1:]
        with Waits() as waits:
            model(input_ids=token, attention_mask=mask, past_key_values=cache)
        assert not waits.places


@pytest.mark.parametrize("batch", ["single", "padded3"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_decoding_as_a_cuda_graph_gives_the_same_logits(family, batch):
    model, steps = on_gpu(family), 6
    prompts = [to_gpu(zoo.inputs(family, model, batch, seed=seed)) for seed in range(3)]
    visual = zoo.visual_mask(model, prompts[0]["input_ids"].cpu()).sum(dim=1).tolist()
    text = prompts[0]["input_ids"].shape[1] - min(visual)
    torch._dynamo.reset()
    with (pruning := AutoPrune(Budget.ratio(0.5))(model)):
        cache = pruning.static_cache(visual, text, steps + 1)
        for inputs in prompts:
            growing, tokens = oracle.generate_logits(model, inputs, steps)
            cache.reset()
            # On a GPU `generate` compiles decoding on a static cache by itself, as CUDA graphs.
            compiled, same = oracle.generate_logits(model, inputs, steps, past_key_values=cache)
            assert torch.equal(tokens, same)
            torch.testing.assert_close(compiled, growing, atol=1e-3, rtol=0)
