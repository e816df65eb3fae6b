"""What happened in a run: a callback for tests."""

import lightning as L
import torch
from torch.distributed.tensor import DTensor

from tests.collectives import Collectives


class Recorder(L.Callback):
    """Loss and gradient norm of every optimizer step, what every rollout sent, and what is left at the end."""

    def __init__(self):
        self.losses, self.norms, self.window, self.rollouts = [], [], [], []

    def on_train_start(self, trainer, module):
        collect = module._collect

        def counted(*args):
            with Collectives() as sent:
                collect(*args)
            self.rollouts.append(dict(sent.counts))

        module._collect = counted

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.window.append(trainer.callback_metrics["policy/loss"].item())
        if len(self.window) == trainer.accumulate_grad_batches:
            self.losses.append(sum(self.window) / len(self.window))
            self.window = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        grads = [whole(p.grad).flatten() for p in module.parameters() if p.grad is not None]
        self.norms.append(torch.cat(grads).norm().item())

    def on_train_end(self, trainer, module):
        trained = {name: whole(p.detach()).clone() for name, p in module.named_parameters() if p.requires_grad}
        self.result = {"losses": self.losses, "norms": self.norms, "weights": trained}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
