"""Tells another process how far a run is."""

from pathlib import Path

from lightning.pytorch import Callback


class Beacon(Callback):
    """Creates the file ``beacon`` after four steps."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 4:
            Path("beacon").touch()
