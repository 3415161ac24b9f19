"""What lmms-eval finds by the entry point group `lmms_eval.models`."""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """The models that this package adds: `--model autoprune`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id="autoprune",
            chat_class_path="autoprune.evaluation.harness.model.AutoPruneChat",
            simple_class_path="autoprune.evaluation.harness.model.AutoPruneSimple",
        )
    ]
