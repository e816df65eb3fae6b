"""Evaluation of a unified model as an auto-encoder: caption, reconstruct, score. Training adds to this."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics import MeanMetric, Metric

from uae.data.module import NeedsCaptions
from uae.metrics import Once, UnifiedScore, part_of
from uae.rewards import WeightedReward
from uae.rollout import Plan, autoencode
from uae.strategy import unsharded
from uae.types import UMM, ImageBatch


class AutoEncoder(LightningModule):
    """Validation, test and prediction of a system, without training.

    ``umm`` holds captioner, conditioner and renderer in an attribute that Lightning does not search. Only the trainable
    networks ``policy`` and ``image_policy`` are registered as submodules. So frozen weights never get into the optimizer, a
    checkpoint or a distributed wrapper.

    Args:
        reward: Scores the reconstructions.
        evaluation: Settings of the rollout with one caption per image.
        unified_score: Metric of the similarity of images and reconstructions, logged as ``unified_score/<name>``; None
            logs none.
        metrics: Further metrics, with ``update(texts, reconstructions, batch)``; ``compute`` returns a dictionary from tags
            to values. One that reads ``batch["caption"]`` has to say so by an attribute ``needs_captions = True``.
    """

    def __init__(
        self,
        reward: WeightedReward,
        evaluation: Plan,
        unified_score: UnifiedScore | None = None,
        metrics: dict[str, Metric] | None = None,
    ) -> None:
        super().__init__()
        self._umm: UMM | None = None  # configure_model sets it
        self.policy: nn.Module | None = None  # configure_model sets it
        self.image_policy: nn.Module | None = None  # configure_model sets it if the renderer's own network trains
        self.reward, self.evaluation = reward, evaluation
        self.unified_score, self.metrics = unified_score, nn.ModuleDict(metrics or {})
        self.mean_reward = MeanMetric(nan_strategy="ignore")
        self.once = Once()

    @property
    def needs_captions(self) -> bool:
        """Whether a metric reads the captions of the data set. Training reads none."""
        return any(isinstance(metric, NeedsCaptions) and metric.needs_captions for metric in self._more_metrics())

    @property
    def umm(self) -> UMM:
        """Captioner, conditioner and renderer; they exist after ``configure_model`` has been called.

        Raises:
            RuntimeError: The system is not built yet.
        """
        if self._umm is None:
            raise RuntimeError("the system is not built yet: a trainer's configure_model builds it")
        return self._umm

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Any]:
        """Caption, reconstruct, score. An image that comes again, on whatever process, does not count again.

        Returns:
            What `predict_step` returns, for callbacks, and ``held_out`` [B]: the mean cosine under the held-out encoders of
            ``unified_score``, where it has some.
        """
        result = self.predict_step(batch)
        if self.unified_score is not None:
            self.unified_score.update(result["reconstruction"], batch["image"], batch["id"])
            if self.unified_score.held_out:
                result["held_out"] = self.unified_score.last_held_out()
        rows = self.once.new(batch["id"])
        if not rows:
            return result
        self.mean_reward.update(result["reward"][rows])
        captions = [result["caption"][row] for row in rows]
        for metric in self._more_metrics():
            metric.update(captions, result["reconstruction"][rows], part_of(batch, rows))
        return result

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over all ranks and reset them."""
        self._log_metrics("val")

    def test_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Any]:
        """As in validation."""
        return self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """As in validation."""
        self._log_metrics("test")

    def predict_step(self, batch: ImageBatch, batch_idx: int = 0) -> dict[str, Any]:
        """One caption and reconstruction per image.

        Returns:
            ``id`` [B]; ``image`` and ``reconstruction`` [B, 3, H, W]; ``caption``, B strings; ``reward`` [B] and
            ``reward/<part>`` [B].
        """
        with self.whole_policies():
            rollout, reconstructions_BCHW, _ = autoencode(self.umm, batch, self.evaluation, step=-1)
        rewards = self.reward(batch["image"], reconstructions_BCHW, rollout.texts)
        return {
            "id": batch["id"],
            "image": batch["image"],
            "caption": rollout.texts,
            "reconstruction": reconstructions_BCHW,
            "reward": rewards.reward_BG.flatten(),
            **{f"reward/{name}": part_BG.flatten() for name, part_BG in rewards.parts.items()},
        }

    @contextmanager
    def whole_policies(self) -> Iterator[None]:
        """Inside, every rank holds the whole weights of both policies, even under a sharding strategy."""
        with unsharded(self.policy), unsharded(self.image_policy):
            yield

    def _log_metrics(self, stage: str) -> None:
        values: dict[str, Any] = {f"{stage}_reward/mean": self.mean_reward.compute()}
        if self.unified_score is not None:
            values |= {f"unified_score/{name}": score for name, score in self.unified_score.compute().items()}
        for metric in self._more_metrics():
            values |= metric.compute()
        self.log_dict({name: torch.as_tensor(value, dtype=torch.float32) for name, value in values.items()})
        for one in (self.mean_reward, self.once, self.unified_score, *self._more_metrics()):
            if one is not None:
                one.reset()

    def _more_metrics(self) -> list[Any]:
        return list(self.metrics.values())  # a ModuleDict, whose type does not tell that they are metrics

    def _place(self) -> None:
        """Move the frozen parts, which Lightning does not know, to the policy's device."""
        for part in (self.umm.captioner, self.umm.conditioner, self.umm.renderer):
            part.to(self.device)
        self.reward.load(self.device)
        if self.unified_score is not None:
            self.unified_score.load(self.device)

    def on_fit_start(self) -> None:
        """Move the frozen parts, once the policy is on its device."""
        self._place()

    on_validation_start = on_test_start = on_predict_start = on_fit_start
