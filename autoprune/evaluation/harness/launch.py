"""`python -m autoprune.evaluation.harness.launch`: lmms-eval with the plugin, however this was installed."""

from __future__ import annotations

from lmms_eval.__main__ import cli_evaluate
from lmms_eval.models import MODEL_REGISTRY_V2

from .plugin import manifests

if __name__ == "__main__":
    for manifest in manifests():
        # A checkout that is only on the path has no entry point.
        MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)
    cli_evaluate()
