"""How well the captioner tells true captions from captions with one mistake, at every validation."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from uae.evaluation import AutoEncoder
from uae.miniature.metrics.mini_mmt import LETTERS, likelihood, mini_mmt
from uae.miniature.scenes import Split
from uae.strategy import unsharded


class MiniMMT(Callback):
    """Logs the miniatures' MMT-Bench as ``understanding/<subtask>`` and ``understanding/overall``; nothing is drawn.

    Args:
        questions: Number of questions per subtask, a multiple of four. The 95 % interval of a subtask's share is about 4
            points to each side with 400 questions, and 9 with 100.
        seed: Random seed of the questions, which are the same at every validation.
    """

    def __init__(self, questions: int = 100, seed: int = 0) -> None:
        if questions < LETTERS or questions % LETTERS:
            raise ValueError(f"questions={questions} of uae.miniature.callbacks.mini_mmt.MiniMMT; allowed: multiples of {LETTERS}")
        self.questions, self.seed = questions, seed

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All ranks answer the same questions, so there is nothing to reduce. A cold start has its own scores, and none of these."""
        if not isinstance(pl_module, AutoEncoder):
            return
        split: Split = "test" if trainer.testing else "val"
        with unsharded(pl_module.policy):
            found = mini_mmt(likelihood(pl_module.umm.captioner), self.questions, self.seed, split)
        pl_module.log_dict({f"understanding/{subtask}": one.value for subtask, one in found.items()})

    on_test_epoch_end = on_validation_epoch_end
