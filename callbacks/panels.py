"""Shows captions and reconstructions of validation images in TensorBoard."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from uae.rollout import Experience, roll_out
from uae.types import ImageBatch

TILE = 160  # side of an image and height of the caption under it, in pixels
LINE = 12
WIDTH = 26  # characters of Pillow's default font that fit in a tile


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
        # One mini-batch fits any number of images, and a batch-wide scale would mix in other ranks' examples.
        scale = "group" if module.plan.advantage_scale == "batch" else module.plan.advantage_scale
        plan = replace(module.plan, mini_batches=1, advantage_scale=scale, train="captions", reconstructions=1)
        with module.whole_policies():
            return roll_out(module.umm, module.reward, batch, plan, step=-1)


def _logger(trainer: Trainer) -> TensorBoardLogger | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def panel(sources_BCHW: Tensor, experience: Experience, columns: int) -> Tensor:
    """One uint8 image ``[3, H, W]``: a row per source, its reconstructions beside it, numbers and captions below."""
    group = experience.rollout.group
    shown = min(group, columns)
    texts = [
        textwrap.wrap(text, WIDTH, max_lines=12, placeholder=" ...") or ["(empty)"] for text in experience.rollout.texts
    ]
    height = TILE + LINE * (2 + max(map(len, texts)))
    canvas = Image.new("RGB", ((TILE + 8) * (shown + 1), height * len(sources_BCHW)), "white")
    for b, source in enumerate(sources_BCHW):
        _tile(canvas, 0, b * height, source, ["source"])
        for g in range(shown):
            n = b * group + g
            reward, advantage = (float(x[b, g]) for x in (experience.rewards.reward_BG, experience.advantage_BG))
            lines = [f"reward {reward:.3f}  adv {advantage:+.2f}", *texts[n]]
            _tile(canvas, (TILE + 8) * (g + 1), b * height, experience.reconstructions_NCHW[n], lines)
    return pil_to_tensor(canvas)


def _tile(canvas: Image.Image, left: int, top: int, image_CHW: Tensor, lines: Sequence[str]) -> None:
    """An image, scaled to fit, above its text. Small images keep hard pixels: blur would hide what the model drew."""
    image = to_pil_image(image_CHW.float().nan_to_num().clamp(0, 1).cpu())
    scale = TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas.paste(image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC), (left, top))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(10)
    for i, line in enumerate(lines):
        draw.text((left + 2, top + TILE + 2 + LINE * i), line, fill="black", font=font)


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
