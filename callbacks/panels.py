"""Shows captions and reconstructions of validation images in TensorBoard."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from uae.files.tiles import Tile, grid, wrapped
from uae.groups import Filtering
from uae.rollout import Experience, roll_out
from uae.types import ImageBatch


class RolloutPanels(Callback):
    """Shows one rollout of the same validation images at every validation, the one before training included.

    The image ``panel/rollouts`` has a row per image: the source, then the G reconstructions, each above its caption,
    reward and advantage. The text ``panel/captions`` is the same as a table. Captions are sampled as in training, with
    the same random numbers every time. Histograms of the training rollouts: ``reward/histogram``,
    ``advantage/histogram``, ``caption/length_histogram``.

    Args:
        images: Validation images to show, taken from the first batch.
        columns: Reconstructions to show of every image, at most G.
        every_n_rollouts: Number of training rollouts from one histogram to the next.
    """

    def __init__(self, images: int = 4, columns: int = 8, every_n_rollouts: int = 10) -> None:
        if min(images, columns, every_n_rollouts) < 1:
            raise ValueError(
                f"callbacks.panels.RolloutPanels images={images}, columns={columns}, every_n_rollouts={every_n_rollouts}; "
                "allowed: 1 or more"
            )
        self.images, self.columns, self.every_n_rollouts = images, columns, every_n_rollouts
        self._batch: ImageBatch | None = None
        self._seen: Experience | None = None
        self._rollouts = 0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first images of the first batch."""
        if batch_idx == 0 and dataloader_idx == 0:
            self._batch = {"image": batch["image"][: self.images], "id": batch["id"][: self.images]}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample captions and show them. All ranks take part, as a sharded policy needs them; the first rank writes."""
        logger = _logger(trainer)
        if logger is None or self._batch is None or getattr(pl_module, "umm", None) is None:
            return
        experience = self._roll_out(pl_module, self._batch)
        if trainer.is_global_zero:
            sources_BCHW = self._batch["image"].cpu()
            logger.experiment.add_image(
                "panel/rollouts", panel(sources_BCHW, experience, self.columns), trainer.global_step
            )
            logger.experiment.add_text("panel/captions", markdown(experience), trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write histograms of the training rollout, once per rollout."""
        experience, logger = getattr(pl_module, "experience", None), _logger(trainer)
        if experience is None or experience is self._seen:
            return
        self._seen, due = experience, self._rollouts % self.every_n_rollouts == 0
        self._rollouts += 1
        if not due or logger is None or not trainer.is_global_zero:
            return
        values = {
            "reward/histogram": experience.rewards.reward_BG,
            "advantage/histogram": experience.advantage_BG,
            "caption/length_histogram": experience.rollout.mask_RS.sum(1),
        }
        for tag, value in values.items():
            finite = value[value.isfinite()].float().cpu()
            if len(finite):
                logger.experiment.add_histogram(tag, finite, trainer.global_step)

    @staticmethod
    def _roll_out(module: Any, batch: ImageBatch) -> Experience:
        # One mini-batch fits any number of images (of the reference), and a batch-wide scale would mix in other ranks' examples.
        scale = "group" if module.plan.advantage_scale == "batch" else module.plan.advantage_scale
        alone = {"advantage_scale": scale, "advantage_order": "sum_then_normalize", "filtering": Filtering()}  # asks no other rank
        plan = replace(module.plan, mini_batches=1, train="captions", reconstructions=1, **alone)
        with module.whole_policies():
            return roll_out(module.umm, module.reward, batch, plan, step=-1)


def _logger(trainer: Trainer) -> TensorBoardLogger | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def panel(sources_BCHW: Tensor, experience: Experience, columns: int) -> Tensor:
    """One uint8 image ``[3, H, W]``: a row per source, its reconstructions beside it, numbers and captions below."""
    group, rows = experience.rollout.group, []
    for b, source in enumerate(sources_BCHW):
        row: list[Tile] = [(source, ["source"])]
        for g in range(min(group, columns)):
            n = b * group + g
            reward, advantage = (float(x[b, g]) for x in (experience.rewards.reward_BG, experience.advantage_BG))
            lines = [f"reward {reward:.3f}  adv {advantage:+.2f}", *wrapped(experience.rollout.texts[n])]
            row.append((experience.reconstructions_NCHW[n], lines))
        rows.append(row)
    return pil_to_tensor(grid(rows))


def markdown(experience: Experience) -> str:
    """A table of captions; bars and line breaks are escaped so that no caption can break it."""
    rows = ["| image | caption | reward | advantage |", "|---|---|---|---|"]
    group = experience.rollout.group
    for n, text in enumerate(experience.rollout.texts):
        b, g = divmod(n, group)
        safe = " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())
        reward, advantage = (float(x[b, g]) for x in (experience.rewards.reward_BG, experience.advantage_BG))
        rows.append(f"| {int(experience.id_B[b])} | {safe} | {reward:.3f} | {advantage:+.2f} |")
    return "\n".join(rows)
