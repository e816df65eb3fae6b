"""Registers the model ``uae`` with lmms-eval, by the entry point ``uae`` of the group ``lmms_eval.models``."""

from __future__ import annotations

MODEL = "uae"


def manifest() -> object:
    """The manifest that names the model's class. lmms-eval calls this while it is being imported, so the import is local."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL, simple_class_path="uae.bench.understanding.lmms_eval_model.TrainedCaptioner")
