"""Supervised cold start: everything that is trained before the reward, by one LightningModule."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from uae.checkpoints.trainable import check_trainable_state, trainable_state
from uae.coldstart.objective import Objective
from uae.coldstart.system_objective import SystemObjective
from uae.data import ImageData
from uae.models.finetune import Finetune
from uae.rewards import WeightedReward
from uae.trainer import data_module, is_dry_run
from uae.types import ImageBatch, System
from uae.weights.checksums import checksums


class ColdStart(L.LightningModule):
    """Minimises one objective and writes the trained modules at the end.

    The system, what trains, the reward and the seed have the names and meanings of `uae.module.UnifiedGRPO`, so that a
    stage fragment over a run of that class (configs/stages/cold_start_*.yaml) starts the same system.

    Args:
        objective: What to minimise; see `uae.coldstart`.
        system: What to assemble, for objectives that train any system; the miniature's own objectives build their own.
        finetune: What of the captioner trains, where the objective asks: ``LoRA`` or ``Full``.
        reward: Where an objective that compares images looks for its encoder. Nothing else of it is used.
        instruction: Question put beside every image; None is the system's own.
        seed: Of noise, times and the adapter's start.
        learning_rate: Peak, reached after ``warmup`` steps, then a cosine to zero at ``trainer.max_steps``.
        warmup: Steps.
        weight_decay: Of AdamW.
        folder: Folder that the weights are written to; None is ``cold_start`` in the log directory.
    """

    def __init__(
        self,
        objective: Objective,
        system: System | None = None,
        finetune: Finetune | None = None,
        reward: WeightedReward | None = None,
        instruction: str | None = None,
        seed: int = 0,
        learning_rate: float = 1e-3,
        warmup: int = 100,
        weight_decay: float = 0.01,
        folder: str | None = None,
    ) -> None:
        super().__init__()
        self.objective = objective
        self.learning_rate, self.warmup, self.weight_decay = learning_rate, warmup, weight_decay
        self.of_system = isinstance(objective, SystemObjective)
        if isinstance(objective, SystemObjective):
            objective.use(system, finetune, reward, instruction, seed)
        self.folder = Path(folder) if folder else None
        self.batches_per_rollout = 1
        self.strict_loading = not self.of_system  # its checkpoints hold what trains; on_load_checkpoint is stricter
        self._built = False

    def configure_model(self) -> None:
        """Build the objective's modules, once."""
        if self.device_mesh is not None:
            raise ValueError(
                "trainer.strategy shards, which a cold start cannot: set it to auto or ddp (configs/trainer/ddp.yaml)"
            )
        if not self._built:
            self.objective.build()
            self._built = True

    def on_fit_start(self) -> None:
        """A schedule needs an end, captions must be there, and what Lightning does not know of follows the rest."""
        if self.trainer.max_steps < 1:
            raise ValueError(
                f"trainer.max_steps={self.trainer.max_steps}; a cold start needs 1 or more: set trainer.max_steps"
            )
        if isinstance(self.objective, SystemObjective):
            if isinstance(data := data_module(self.trainer), ImageData):
                data.check_captions()
            self.place()
        if self.folder is None:
            self.folder = Path(self.trainer.log_dir or ".", "cold_start")  # asking for log_dir is collective

    def place(self) -> None:
        """Move the system to where its trained parts are."""
        if isinstance(self.objective, SystemObjective):
            self.objective.place(self.device)

    on_validation_start = on_test_start = place

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """One step on the objective."""
        self.objective.step = self.global_step
        losses = self.objective(batch, self.global_step / self.trainer.max_steps)
        self.log_dict({f"{self.name}/{name}": value for name, value in losses.items()}, prog_bar=True)
        return losses["loss"]

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """The objective's own score of held-out images."""
        scores = {f"{self.name}/{name}": value for name, value in self.objective.score(batch).items()}
        self.log_dict(scores, batch_size=len(batch["image"]), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: ImageBatch, batch_idx: int = 0) -> None:
        """Nothing to predict."""
        raise ValueError(
            "a cold start predicts nothing: leave its fragment out, and predict with what it wrote (uae.coldstart.Started)"
        )

    @property
    def name(self) -> str:
        """The objective's name in tags: ``flow_matching`` and the like."""
        return type(self.objective).__module__.rsplit(".", 1)[-1]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine decay."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, self.learning_rate, betas=(0.9, 0.98), weight_decay=self.weight_decay)

        def scale(step: int) -> float:
            return min(1.0, (step + 1) / self.warmup) * (
                0.5 + 0.5 * math.cos(math.pi * min(1.0, step / self.trainer.max_steps))
            )

        scheduler = {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, scale), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}  # type: ignore[return-value]

    def on_fit_end(self) -> None:
        """Write the weights (averaged, where a callback averages) and their checksums, of a run that was not cut short."""
        if self.trainer.is_global_zero and not is_dry_run(self.trainer) and not self.trainer.interrupted:
            assert self.folder is not None
            self.objective.eval().save(self.folder)
            if self.of_system:
                return
            (self.folder / "checksums.json").write_text(json.dumps(checksums(self.folder), indent=2) + "\n")

    # --------------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Of a system, keep what trains."""
        if self.of_system and "state_dict" in checkpoint:
            checkpoint["state_dict"] = trainable_state(self, checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of something else."""
        if self.of_system and "state_dict" in checkpoint:
            check_trainable_state(self, checkpoint["state_dict"], getattr(self._trainer, "ckpt_path", None))
