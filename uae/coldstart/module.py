"""The LightningModule of the cold start, the supervised training before reinforcement learning."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from uae.checkpoints.adapters import ADAPTERS, adapters_of, check_adapters
from uae.checkpoints.resuming import begin_resumed, note_settings, resumable
from uae.checkpoints.trainable import check_trainable_state, trainable_state
from uae.coldstart.objective import Objective
from uae.coldstart.system_objective import SystemObjective
from uae.metrics import Once, part_of
from uae.models.finetune import Finetune, check_resolution
from uae.rewards import WeightedReward
from uae.trainer import check_precision, is_dry_run
from uae.types import ImageBatch, System
from uae.weights.checksums import checksums
from uae.windows import close_window


class ColdStart(L.LightningModule):
    """Minimises one objective and writes the trained modules at the end.

    The arguments system, finetune, reward, instruction and seed have the names and meanings that they have in
    `uae.module.UnifiedGRPO`. So a file of configs/stages/cold_start_*.yaml, given after a complete configuration of
    UnifiedGRPO, trains the same system.

    Args:
        objective: The loss to minimise and the modules it trains; `uae.coldstart` lists the objectives.
        system: The system to train. None for the objectives of the miniature, which build their own modules.
        finetune: Which weights of the captioner train, for objectives that train it: ``LoRA`` or ``Full``.
        reward: `SemanticReconstruction` takes its image encoder from here if it was given none. No reward is computed.
        instruction: The question that the captioner gets with every image; None is the system's own.
        seed: Random seed of the noise, of the denoising times and of the adapter's initial weights.
        learning_rate: Peak learning rate of AdamW. It is reached after ``warmup`` steps and then falls to zero along a
            cosine that ends at ``trainer.max_steps``.
        warmup: Optimizer steps over which the learning rate rises linearly.
        weight_decay: Weight decay of AdamW.
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
        if folder == "":
            raise ValueError("model.init_args.folder='' is no folder; allowed: a folder, or null for one in the log directory")
        self.folder = None if folder is None else Path(folder)
        self.batches_per_rollout = 1
        self.strict_loading = not self.of_system  # a checkpoint holds trained weights only; on_load_checkpoint checks them
        self.once = Once()
        self._built = False

    def setup(self, stage: str) -> None:
        """Refuse precisions in which small updates are lost."""
        check_precision(self.trainer)

    def configure_model(self) -> None:
        """Build the objective's modules at the first call.

        Raises:
            ValueError: The strategy shards weights.
        """
        if self.device_mesh is not None:
            raise ValueError(
                "trainer.strategy shards the weights, but a cold start cannot be sharded; allowed: auto, ddp "
                "(configs/trainer/ddp.yaml); change trainer.strategy"
            )
        if not self._built:
            self.objective.build()
            self._built = True

    def on_fit_start(self) -> None:
        """Check the number of steps, and move the parts that Lightning does not know to the device.

        Raises:
            ValueError: ``trainer.max_steps`` is not set.
        """
        if self.trainer.max_steps < 1:
            raise ValueError(
                f"trainer.max_steps={self.trainer.max_steps}; allowed: 1 or more, as the learning rate ends there; change "
                "trainer.max_steps"
            )
        check_resolution({"reading.dtype": self.objective})
        if isinstance(self.objective, SystemObjective):
            self.place()
        if self.folder is None:
            self.folder = Path(self.trainer.log_dir or ".", "cold_start")  # reading log_dir is a collective operation

    def place(self) -> None:
        """Move the frozen parts of the system to the device of the trained ones."""
        if isinstance(self.objective, SystemObjective):
            self.objective.place(self.device)

    on_validation_start = on_test_start = place

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Log the objective's values and return its loss."""
        self.objective.step = self.global_step
        losses = self.objective(batch, self.global_step / self.trainer.max_steps)
        self.log_dict({f"{self.name}/{name}": value for name, value in losses.items()}, prog_bar=True)
        return losses["loss"]

    def on_after_backward(self) -> None:
        """Let every batch of an optimizer step count the same, also where an epoch ends inside an accumulation window."""
        close_window(self)

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Log the objective's score on held-out images. An image that comes again, on whatever process, does not count again."""
        rows = self.once.new(batch["id"])
        images = part_of(batch, rows) if rows else batch  # every process has to log; without new images, with weight 0
        scores = {f"{self.name}/{name}": value for name, value in self.objective.score(images).items()}
        self.log_dict(scores, batch_size=len(rows), sync_dist=True)

    test_step = validation_step

    def on_validation_epoch_start(self) -> None:
        """Forget which images came in earlier validations."""
        self.once.reset()

    on_test_epoch_start = on_validation_epoch_start

    def predict_step(self, batch: ImageBatch, batch_idx: int = 0) -> None:
        """Refuse to predict.

        Raises:
            ValueError: Always; a cold start has no predictions.
        """
        raise ValueError(
            "uae.coldstart.ColdStart cannot predict: leave configs/stages/cold_start*.yaml out and set "
            "model.init_args.system to uae.coldstart.Started with the folder that the cold start wrote"
        )

    @property
    def needs_captions(self) -> bool:
        """Whether the objective learns from captions of the data set. Then images without a caption are skipped."""
        return self.of_system

    @property
    def name(self) -> str:
        """The first part of logged tags: the name of the objective's Python module, such as ``flow_matching``."""
        return type(self.objective).__module__.rsplit(".", 1)[-1]

    def configure_optimizers(self) -> Any:
        """AdamW; its learning rate rises linearly over ``warmup`` steps and falls to zero along a cosine."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, self.learning_rate, betas=(0.9, 0.98), weight_decay=self.weight_decay)

        def scale(step: int) -> float:
            return min(1.0, (step + 1) / self.warmup) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / self.trainer.max_steps)))

        return resumable(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, scale))

    def on_fit_end(self) -> None:
        """Write the weights and their checksums, unless the run was interrupted.

        Where a callback averages weights, the averages are written.
        """
        if self.trainer.is_global_zero and not is_dry_run(self.trainer) and not self.trainer.interrupted:
            assert self.folder is not None
            self.objective.eval().save(self.folder)
            if self.of_system:
                return
            (self.folder / "checksums.json").write_text(json.dumps(checksums(self.folder), indent=2) + "\n")

    # --------------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only the trained weights of a system in the checkpoint, and the settings."""
        if self._trainer is not None:
            note_settings(self._trainer, checkpoint)
        if self.of_system and "state_dict" in checkpoint:
            checkpoint["state_dict"] = trainable_state(self, checkpoint["state_dict"])
            checkpoint[ADAPTERS] = adapters_of(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose weights are not those that train here."""
        if self.of_system and "state_dict" in checkpoint:
            path = None if self._trainer is None else self._trainer.ckpt_path
            check_adapters(self, checkpoint, path)
            check_trainable_state(self, checkpoint["state_dict"], path)
        if self._trainer is not None:
            begin_resumed(self._trainer, checkpoint)
