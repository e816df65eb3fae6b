"""Stops a run that has gone wrong, and says which key to turn."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor


class Health(Callback):
    """Stops at the first loss, gradient or rollout without a finite number, on all ranks, before the weights change.

    Single missing rewards (NaN) are no reason to stop: their rows are left out of the advantages.

    Args:
        patience: Rollouts in a row in which no group has different rewards before it warns that nothing is learned.
    """

    def __init__(self, patience: int = 10) -> None:
        if patience < 1:
            raise ValueError(f"callbacks.health.Health patience={patience}; allowed: 1 or more")
        self.patience = patience
        self._seen: Any = None
        self._flat = 0  # rollouts in a row without a signal

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check rewards (once per rollout) and the loss."""
        experience = getattr(pl_module, "experience", None)
        if experience is not None and experience is not self._seen:
            self._seen = experience
            self._check_rewards(trainer, experience.rewards.reward_BG)
        if _anywhere(trainer, not bool(loss.isfinite())):
            _stop(trainer, f"the loss is {loss.item()}", "lower model.init_args.optimizer.init_args.lr")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Check the gradients."""
        if trainer.precision == "16-mixed":  # its loss scaling makes infinite gradients and skips those steps
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients and not bool(total_norm(gradients).isfinite()):  # the same number on every rank
            _stop(
                trainer,
                "a gradient is not finite",
                "lower model.init_args.optimizer.init_args.lr or raise the precision (trainer.precision)",
            )

    def _check_rewards(self, trainer: Trainer, reward_BG: Tensor) -> None:
        finite_BG = reward_BG.isfinite()
        if _anywhere(trainer, not bool(finite_BG.any())):
            _stop(trainer, "no reward of the rollout is finite", "check model.init_args.reward and the reconstructions")
        spread_B = reward_BG.masked_fill(~finite_BG, -torch.inf).amax(1) - reward_BG.masked_fill(
            ~finite_BG, torch.inf
        ).amin(1)
        self._flat = 0 if bool((spread_B > 0).any()) else self._flat + 1
        if self._flat == self.patience:
            rank_zero_warn(
                f"in {self.patience} rollouts no group had different rewards, so nothing is learned: raise "
                "model.init_args.sampling.temperature or check model.init_args.reward"
            )


def total_norm(gradients: list[Tensor]) -> Tensor:
    """Norm of all gradients together, sharded ones included."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _anywhere(trainer: Trainer, bad: bool) -> bool:
    """Whether any rank says so; a rank that stops alone would leave the others waiting."""
    return bool(trainer.strategy.reduce_boolean_decision(bad, all=False))


def _stop(trainer: Trainer, what: str, advice: str) -> None:
    raise FloatingPointError(f"{what} at step {trainer.global_step}; {advice}")
