"""What lmms-eval asks for when it looks for models: entry point ``uae`` of the group ``lmms_eval.models``."""

from __future__ import annotations

from typing import Any

MODEL = "uae"


def manifest() -> Any:
    """Where the model is. Called by lmms-eval while it is being imported, so nothing else of it may be."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL, simple_class_path="uae.bench.understanding.lmms_eval_model.TrainedCaptioner")
