"""What some tasks of the harness need beside a model, said before hours of work and not behind them."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

_UPLOAD = (
    "vqav2_test", "vizwiz_vqa_test", "textvqa_test", "textcaps_test", "docvqa_test", "infovqa_test",
    "infographicvqa_test", "mmbench_*_test", "mmmu_test", "nocaps_test", "coco*_cap_test", "egoschema",
    "longvideobench_test_*", "stvqa", "multidocvqa_test",
)  # fmt: skip
"""Their answers are secret: the harness writes a file for their server, and no score."""
_JUDGE = (
    "mmbench_*_dev", "mmbench_*_dev_lite", "mmvet*", "llava_in_the_wild", "llava_wilder*", "mathvista*",
    "mathverse*", "hallusion_bench*", "mia_bench", "vibe_eval", "wild_vision*", "live_bench*", "mix_evals*",
    "video_dc*", "videochatgpt*", "activitynetqa*", "charxiv*", "mmvu*", "olympiadbench*", "seephys*",
)  # fmt: skip
"""A model of OpenAI's reads the answers; it is asked over the network and paid for."""
_KEYS = ("OPENAI_API_KEY", "AZURE_API_KEY")
_JAVA = ("coco*", "nocaps*", "flickr30k*", "textcaps*")
"""Captions are cut into words, and METEOR is computed, by programs in Java."""
_INSTEAD = {
    "vqav2_test": "vqav2_val",
    "vizwiz_vqa_test": "vizwiz_vqa_val",
    "textvqa_test": "textvqa_val",
    "mmmu_test": "mmmu_val",
    "egoschema": "egoschema_subset",
    "mmbench_en_dev": "mmbench_en_dev_static",
    "mmbench_en_test": "mmbench_en_dev_static",
}


def check_needs(tasks: Sequence[str]) -> None:
    """Raise ValueError with all that the tasks need and is not there, and the way out of each."""
    missing = list(dict.fromkeys(line for task in tasks for line in _missing(task)))
    if missing:
        raise ValueError("; ".join(missing))


def check_harness() -> None:
    """Raise ImportError if lmms-eval is not installed."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise ImportError(
            "these tasks need the harness lmms-eval: pip install 'autoprune[eval]'; the suite shapes needs "
            "nothing"
        )


def _missing(task: str) -> Iterator[str]:
    instead = f"; take {_INSTEAD[task]} instead" if task in _INSTEAD else "; leave it out"
    if _is_one_of(task, _UPLOAD):
        yield f"{task} gives no score here: its answers have to be uploaded to a server{instead}"
    if _is_one_of(task, _JUDGE) and not any(os.environ.get(key) for key in _KEYS):
        yield f"{task} is judged by a model of OpenAI's and needs OPENAI_API_KEY{instead}"
    if _is_one_of(task, _JAVA) and shutil.which("java") is None:
        yield f"{task} is scored by programs in Java, and there is no java here; install it"


def _is_one_of(task: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(task, pattern) for pattern in patterns)
