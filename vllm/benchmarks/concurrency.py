"""How many requests run at once, and how soon they answer, where key and value blocks are few.

A LLaVA of random weights with 576 visual tokens, 16 requests that come at once, and 64 blocks of 32 tokens. A
request's blocks fall with its budget, so more requests run at the same time.

    python vllm/benchmarks/concurrency.py --output vllm/benchmarks/results/concurrency.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

BLOCKS, BLOCK, REQUESTS, NEW_TOKENS, SIDE = 64, 32, 16, 16, 336
QUESTION = "what color is the circle ?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budgets", default="576,192,64", help="visual tokens, divided by commas")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    budgets = [int(budget) for budget in options.budgets.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder) / "model", budgets, options.rounds)
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(f"{text}\n", encoding="utf-8")


def measure(folder: Path, budgets: Sequence[int], rounds: int) -> dict[str, Any]:
    """Every budget in turn, round by round, on one engine."""
    import torch
    import vllm
    from checkpoints import build
    from equality import start
    from safetensors import safe_open

    from autoprune_vllm import overrides

    text = {
        "hidden_size": 512,
        "intermediate_size": 2080,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
    }
    vision = {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "image_size": SIDE,
        "patch_size": 14,
    }
    build("llava", folder, text=text, vision=vision, side=SIDE, patch=14)
    engine = start(
        folder,
        hf_overrides=overrides(str(folder), "fastervlm"),
        max_model_len=1024,
        num_gpu_blocks_override=BLOCKS,
        block_size=BLOCK,
        max_num_seqs=REQUESTS,
        disable_log_stats=False,
    )
    with safe_open(folder / "model.safetensors", "pt") as weights:
        parameters = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    run(engine, budgets[-1], seed=99)  # the first run compiles and loads
    runs: dict[int, list[dict[str, float]]] = {budget: [] for budget in budgets}
    for number in range(rounds):
        for budget in budgets:
            runs[budget].append(run(engine, budget, seed=number))
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, {torch.get_num_threads()} threads",
        "millions of parameters": round(parameters / 1e6, 1),
        "blocks": BLOCKS,
        "tokens per block": BLOCK,
        "requests": REQUESTS,
        "new tokens per request": NEW_TOKENS,
        "budgets": {str(budget): summary(found) for budget, found in runs.items()},
    }


def run(engine: Any, budget: int, seed: int) -> dict[str, float]:
    """All requests at once, each with a picture of its own, with the prefix cache emptied before."""
    import numpy as np
    from PIL import Image
    from vllm import SamplingParams

    engine.reset_prefix_cache()
    random = np.random.default_rng([seed, budget])
    prompt = f"<s><image> {QUESTION}<|assistant|>"
    settings = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    started = time.perf_counter()
    for number in range(REQUESTS):
        pixels = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        request = {
            "prompt": prompt,
            "multi_modal_data": {"image": Image.fromarray(pixels).resize((SIDE, SIDE))},
            "mm_processor_kwargs": {"autoprune": {"budget": budget}},
        }
        engine.llm_engine.add_request(str(number), request, settings)
    first: dict[str, float] = {}
    most, tokens = 0, 0
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    while engine.llm_engine.has_unfinished_requests():
        outputs = engine.llm_engine.step()
        now = time.perf_counter() - started
        most = max(most, len(scheduler.running))
        for output in outputs:
            tokens = len(output.prompt_token_ids)
            if output.outputs[0].token_ids:
                first.setdefault(output.request_id, now)
    seconds = time.perf_counter() - started
    return {
        "running": most,
        "prompt": tokens,
        "first": statistics.mean(first.values()),
        "rate": REQUESTS / seconds,
    }


def summary(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    return {
        "prompt tokens": int(runs[0]["prompt"]),
        "most requests running at once": int(max(found["running"] for found in runs)),
        "mean seconds to the first token": [round(found["first"], 2) for found in runs],
        "requests per second": [round(found["rate"], 2) for found in runs],
    }


if __name__ == "__main__":
    main()
