"""Ends a prediction as a power cut would."""

import os
import signal

from lightning.pytorch import Callback


class Killer(Callback):
    """Kills the process in the middle of writing the fourth image, when three are finished."""

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 3:
            import callbacks.predictions as predictions

            def torn(image_CHW, path):
                path.parent.mkdir(exist_ok=True)
                path.with_name(f".{os.getpid()}.{path.name}").write_bytes(b"\x89PNG")
                os.kill(os.getpid(), signal.SIGKILL)

            predictions._save = torn
