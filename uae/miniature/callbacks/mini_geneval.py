"""How well the renderer draws from words alone, at every validation."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from uae.evaluation import AutoEncoder
from uae.miniature.metrics.mini_geneval import mini_geneval


class MiniGenEval(Callback):
    """Logs the miniatures' GenEval as ``generation/<task>`` and ``generation/overall``; the captioner plays no part.

    Args:
        prompts: Number of prompts per task.
        seed: Random seed of prompts and noise, which are the same at every validation.
    """

    def __init__(self, prompts: int = 32, seed: int = 0) -> None:
        if prompts < 1:
            raise ValueError(f"prompts={prompts} of uae.miniature.callbacks.mini_geneval.MiniGenEval; allowed: 1 or more")
        self.prompts, self.seed = prompts, seed

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All ranks draw the same images, so there is nothing to reduce. A cold start has its own scores, and none of these."""
        if not isinstance(pl_module, AutoEncoder):
            return
        with pl_module.whole_policies():
            scores = mini_geneval(pl_module.umm, self.prompts, self.seed)
        pl_module.log_dict({f"generation/{task}": score for task, score in scores.items()})

    on_test_epoch_end = on_validation_epoch_end
