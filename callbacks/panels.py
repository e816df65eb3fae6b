"""Shows captions and reconstructions of validation images in the loggers of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from uae.files.tiles import WIDTH, Tile, grid, wrapped
from uae.groups import Filtering
from uae.loggers.showing import Cell, can_show, show_histogram, show_picture, show_table
from uae.rollout import Experience, roll_out
from uae.types import ImageBatch

HEAD = ("image", "caption", "reward", "advantage")


class RolloutPanels(Callback):
    """Shows one rollout of the same validation images at every validation, the one before training included.

    ``panel/image_1`` and so on have the source, and the best, a middling and the worst reconstruction of its group, each above its
    reward, advantage and caption: small enough to be read in TensorBoard without enlarging. The table ``panel/captions`` has all
    captions. They are sampled as in training, with the same random numbers every time. Histograms of the training rollouts:
    ``reward/histogram``, ``advantage/histogram``, ``caption/length_histogram``. Weights & Biases and MLflow get the same
    (`uae.loggers`; MLflow has no histograms), and CSV files nothing of it.

    Args:
        images: Validation images to show, taken from the first batch.
        shown: Reconstructions of every image, at most G, spread evenly from the best to the worst.
        every_n_rollouts: Number of training rollouts from one histogram to the next.
    """

    def __init__(self, images: int = 4, shown: int = 3, every_n_rollouts: int = 10) -> None:
        if min(images, shown, every_n_rollouts) < 1:
            raise ValueError(
                f"callbacks.panels.RolloutPanels images={images}, shown={shown}, every_n_rollouts={every_n_rollouts}; "
                "allowed: 1 or more"
            )
        self.images, self.shown, self.every_n_rollouts = images, shown, every_n_rollouts
        self._batch: ImageBatch | None = None
        self._names: list[str] = []
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
            self._names = batch.get("name", [str(one) for one in batch["id"].tolist()])[: self.images]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample captions and show them. All ranks take part, as a sharded policy needs them; the first rank writes."""
        if not can_show(trainer) or self._batch is None or getattr(pl_module, "umm", None) is None:
            return
        experience = self._roll_out(pl_module, self._batch)
        if trainer.is_global_zero:
            names, step = self._names, trainer.global_step
            for number, picture in enumerate(panels(self._batch["image"].cpu(), names, experience, self.shown), 1):
                show_picture(trainer.loggers, f"panel/image_{number}", picture, step)
            show_table(trainer.loggers, "panel/captions", HEAD, rows_of(names, experience), step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write histograms of the training rollout, once per rollout."""
        experience = getattr(pl_module, "experience", None)
        if experience is None or experience is self._seen:
            return
        self._seen, due = experience, self._rollouts % self.every_n_rollouts == 0
        self._rollouts += 1
        if not due or not trainer.is_global_zero:
            return
        values = {
            "reward/histogram": experience.rewards.reward_BG,
            "advantage/histogram": experience.advantage_BG,
            "caption/length_histogram": experience.rollout.mask_RS.sum(1),
        }
        for tag, value in values.items():
            finite = value[value.isfinite()].float().cpu()
            if len(finite):
                show_histogram(trainer.loggers, tag, finite, trainer.global_step)

    @staticmethod
    def _roll_out(module: Any, batch: ImageBatch) -> Experience:
        # One mini-batch fits any number of images (of the reference), and a batch-wide scale would mix in other ranks' examples.
        scale = "group" if module.plan.advantage_scale == "batch" else module.plan.advantage_scale
        alone = {"advantage_scale": scale, "advantage_order": "sum_then_normalize", "filtering": Filtering()}  # asks no other rank
        plan = replace(module.plan, mini_batches=1, train="captions", reconstructions=1, **alone)
        with module.whole_policies():
            return roll_out(module.umm, module.reward, batch, plan, step=-1)


def panels(sources_BCHW: Tensor, names: Sequence[str], experience: Experience, shown: int) -> list[Image.Image]:
    """A picture per source, two tiles wide: the source above its name, then reconstructions from the best to the worst.

    Args:
        sources_BCHW: Images in [0, 1].
        names: Their B names.
        experience: Their rollout.
        shown: Number of reconstructions; below G, they are spread evenly over the group, ordered by reward.
    """
    group, pictures = experience.rollout.group, []
    for b, source in enumerate(sources_BCHW):
        tiles: list[Tile] = [(source, [f"source {b + 1}", names[b][-WIDTH:]])]
        order = experience.rewards.reward_BG[b].nan_to_num(-torch.inf).argsort(descending=True, stable=True).tolist()
        for g in spread(order, shown):
            reward, advantage = (float(x[b, g]) for x in (experience.rewards.reward_BG, experience.advantage_BG))
            lines = [f"reward {reward:.3f}  adv {advantage:+.2f}", *wrapped(experience.rollout.texts[b * group + g])]
            tiles.append((experience.reconstructions_NCHW[b * group + g], lines))
        pictures.append(grid([tiles[first : first + 2] for first in range(0, len(tiles), 2)]))
    return pictures


def spread(order: Sequence[int], count: int) -> list[int]:
    """``count`` members of a list at equal distances, the first and the last among them; all if there are no more."""
    if count == 1 or len(order) <= count:
        return list(order[:count])
    return [order[round(place * (len(order) - 1) / (count - 1))] for place in range(count)]


def rows_of(names: Sequence[str], experience: Experience) -> list[list[Cell]]:
    """All captions as rows under `HEAD`; the image is its number, as in the tags of the panels, and its name."""
    group, rows = experience.rollout.group, list[list[Cell]]()
    for n, text in enumerate(experience.rollout.texts):
        b, g = divmod(n, group)
        reward, advantage = (float(x[b, g]) for x in (experience.rewards.reward_BG, experience.advantage_BG))
        rows.append([f"{b + 1} ({names[b]})", text, reward, advantage])
    return rows
