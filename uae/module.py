"""Unified-GRPO as a LightningModule: what `uae.rollout` collected becomes a loss, and the rest is bookkeeping.

Optimisation is Lightning's own (automatic): accumulation, clipping, schedulers and checkpoints by step work as anywhere.
One rollout feeds ``mini_batches * num_iterations`` training steps; the data module yields its batch that many times.

Where this differs from the paper (arXiv 2509.09666): old log-probs are replayed rather than taken from the sampler, a
group shares the renderer's noise, and the KL term is off by default.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import Metric

from uae import measure
from uae.evaluation import AutoEncoder
from uae.grpo import GRPOLoss
from uae.metrics import UnifiedScore
from uae.models.finetune import Finetune
from uae.rewards import WeightedReward
from uae.rollout import Experience, Plan, now, parts, roll_out
from uae.strategy import unsharded
from uae.trainable import check_trainable_state, trainable_state
from uae.types import ImageBatch, Sampling, System


class UnifiedGRPO(AutoEncoder):
    """Trains a captioner so that its captions can be drawn.

    Args:
        system: What to assemble; built in ``configure_model``.
        reward: What a reconstruction is worth.
        finetune: What trains: ``LoRA`` or ``Full``.
        loss: The clipped loss, see `uae.grpo.GRPOLoss`.
        sampling: How captions are drawn in training; this defines the policy.
        group: G, captions per image, 2 or more.
        advantage_scale: Divide centred rewards by the std of the "group", of the "batch" (all ranks), or by nothing.
        mini_batches: Parts a rank's batch is updated in; must divide ``data.batch_size``.
        num_iterations: Passes over every rollout.
        shared_noise: The renderer's noise is the same within a group, so that only captions make a difference.
        optimizer: Of the trainable parameters.
        scheduler: Of the learning rate, per optimizer step.
        unified_score: Computed on validation and test images, logged as ``unified_score/<name>``.
        metrics: More metrics with ``update(texts, reconstructions, batch)``; ``compute`` returns tags.
        ratio_tolerance: Largest |ratio - 1| between sampler and training code on a run's first rollout. float32 stays
            near 1e-6; bfloat16 may need 0.1.
        instruction: Question put beside every image; None is the system's own.
        validation_temperature: Of the captions in validation, test and prediction; 0 is greedy.
        seed: Of captions, renderer noise and the adapter's start.
    """

    def __init__(
        self,
        system: System,
        reward: WeightedReward,
        finetune: Finetune,
        loss: GRPOLoss,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        group: int = 8,
        advantage_scale: Literal["group", "batch", "none"] = "group",
        mini_batches: int = 1,
        num_iterations: int = 1,
        shared_noise: bool = True,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        unified_score: UnifiedScore | None = None,
        metrics: dict[str, Metric] | None = None,
        ratio_tolerance: float = 1e-3,
        instruction: str | None = None,
        validation_temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        greedy = replace(sampling, temperature=validation_temperature)
        evaluation = Plan(1, greedy, seed, instruction=instruction)
        super().__init__(reward, evaluation, unified_score, metrics)
        for key, value, least in (
            ("group", group, 2), ("mini_batches", mini_batches, 1), ("num_iterations", num_iterations, 1)
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"model.{key}={value}; allowed: {least} or more")
        if sampling.temperature == 0:
            raise ValueError("model.sampling.temperature=0 makes all captions of an image equal; allowed: above 0")
        self.system, self.finetune, self.loss = system, finetune, loss
        self.plan = Plan(group, sampling, seed, shared_noise, advantage_scale, instruction, mini_batches)
        self.num_iterations, self.ratio_tolerance = num_iterations, ratio_tolerance
        self.optimizer, self.scheduler = optimizer, scheduler
        self.experience: Experience | None = None
        self.strict_loading = False  # on_load_checkpoint is stricter

    # ---------------------------------------------------------------------------------------------------- training

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Rollout, log-probs, loss, log."""
        turn = batch_idx % self.batches_per_rollout
        if turn == 0:
            self._collect(batch, batch_idx)
        experience = self._mini_batch(batch, turn)
        rollout = experience.rollout
        logp_NT = self.umm.captioner.logprobs(rollout)
        terms = self.loss(
            logp_NT,
            rollout.logp_NT,
            experience.advantage_BG.flatten(),
            rollout.mask_NT,
            experience.reference_logp_NT,
            self._normalizer(batch_idx),
        )
        self._log_all(measure.of_update(terms, logp_NT, experience))
        return terms.loss

    @property
    def batches_per_rollout(self) -> int:
        """How many times in a row the data module must yield every batch."""
        return self.plan.mini_batches * self.num_iterations

    @property
    def at_rollout_boundary(self) -> bool:
        """Whether rollout and optimizer step are complete: a checkpoint taken now resumes exactly."""
        ready = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        stepped = ready % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        return ready % self.batches_per_rollout == 0 and stepped

    def _collect(self, batch: ImageBatch, batch_idx: int) -> None:
        """Roll out, and refuse a run whose sampler and training code disagree about the policy."""
        accumulate = self.trainer.accumulate_grad_batches
        step = (self.global_step * accumulate + batch_idx % accumulate) // self.batches_per_rollout
        with unsharded(self.policy):
            self.experience = roll_out(self.umm, self.reward, batch, self.plan, step, self.loss.beta > 0)
        tokens_M = self.experience.rollout.mask_NT.view(self.plan.mini_batches, -1).sum(1)
        if self.loss.aggregation == "dapo":
            tokens_M = self.all_gather(tokens_M).view(-1, self.plan.mini_batches).sum(0)
        self._tokens_M = tokens_M
        seen = self._log_all(
            measure.of_rollout(self.experience, self.plan.sampling.max_tokens)
            | {"condition/truncated": float(self.umm.conditioner.truncated)}  # captions since the start of the run
        )
        if self._first_rollout:
            self._check_gap(float(seen["policy/sampler_gap"]))
            self._first_rollout = False
        self._collected_at = now()

    def _mini_batch(self, batch: ImageBatch, turn: int) -> Experience:
        if self.experience is None:
            raise RuntimeError(
                "the run was resumed inside a rollout, whose captions are gone: resume from a checkpoint whose step is a "
                f"multiple of {self.batches_per_rollout}/accumulate_grad_batches (module.at_rollout_boundary tells)"
            )
        if not torch.equal(batch["id"], self.experience.id_B):
            raise RuntimeError(
                f"the batch changed within a rollout; with model.mini_batches * model.num_iterations="
                f"{self.batches_per_rollout} the data module must yield every batch that many times in a row"
            )
        if self.plan.mini_batches == 1:
            return self.experience
        return self.experience.select(parts(len(batch["id"]), self.plan.mini_batches)[turn % self.plan.mini_batches])

    def _normalizer(self, batch_idx: int) -> Tensor | None:
        """Tokens of the optimizer window, over the number of losses that Lightning and the ranks will average."""
        if self.loss.aggregation not in ("dapo", "bnpo"):
            return None
        accumulate = self.trainer.accumulate_grad_batches
        start = batch_idx // accumulate * accumulate
        tokens = sum(self._tokens_M[turn % self.plan.mini_batches] for turn in range(start, start + accumulate))
        return tokens / (accumulate * (self.trainer.world_size if self.loss.aggregation == "dapo" else 1))

    def on_train_batch_end(self, outputs: Any, batch: ImageBatch, batch_idx: int) -> None:
        """Log what the update took: from the end of the rollout to the end of its last optimizer step."""
        if (batch_idx + 1) % self.batches_per_rollout == 0:
            self.log("time/update", now() - self._collected_at)

    def configure_optimizers(self) -> Any:
        """Trainable parameters only; the scheduler counts optimizer steps."""
        optimizer = self.optimizer([p for p in self.policy.parameters() if p.requires_grad])
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}

    def _log_all(self, values: dict[str, Tensor | float]) -> dict[str, Tensor]:
        """Log over all ranks, with one collective for everything."""
        mine_K = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in values.values()])
        merged = measure.over_ranks(values, self.all_gather(mine_K))
        for name, value in merged.items():
            self.log(name, value, prog_bar=name == "reward/mean")
        return merged

    # ---------------------------------------------------------------------------------------------------------- setup

    def setup(self, stage: str) -> None:
        """Refuse what could only fail, or silently be wrong, later."""
        if stage != "fit":
            return
        self._first_rollout, self.experience = True, None
        size = getattr(self.trainer.datamodule, "batch_size", None)
        if size is not None:
            parts(size, self.plan.mini_batches)
        accumulate, per_rollout = self.trainer.accumulate_grad_batches, self.batches_per_rollout
        if per_rollout % accumulate and accumulate % per_rollout:
            raise ValueError(
                f"trainer.accumulate_grad_batches={accumulate} and model.mini_batches * model.num_iterations={per_rollout}: "
                "one must divide the other, so that rollouts and optimizer steps end together"
            )
        if per_rollout % accumulate and self.loss.aggregation in ("dapo", "bnpo"):
            raise ValueError(
                f"model.loss.aggregation={self.loss.aggregation} divides by the tokens of the optimizer window, which spans "
                f"{accumulate // per_rollout} rollouts of which the later are unknown; set trainer.accumulate_grad_batches "
                f"to a divisor of {per_rollout} (and raise data.batch_size), or use grpo or dr_grpo"
            )

    def configure_model(self) -> None:
        """Build the system, decide what trains, load the encoders, shard where the strategy asks for it. Idempotent."""
        if self.umm is not None:
            return
        umm = self.system.build()
        captioner = umm.captioner
        with torch.random.fork_rng(devices=[]):  # the adapter's start is the same on every rank
            torch.manual_seed(self.plan.seed)
            self.finetune.attach(captioner, keep_reference=self.loss.beta > 0 or umm.needs_reference)
        self.reward.load()
        if self.unified_score is not None:
            self.unified_score.load()
        if self.device_mesh is not None:
            for policy in (captioner.policy, captioner.reference_policy):
                if policy is not None:
                    self.trainer.strategy.shard(policy)
        self.umm, self.policy = umm, captioner.policy

    def on_train_start(self) -> None:
        """Refuse an epoch that would end inside a rollout."""
        batches = self.trainer.num_training_batches
        if batches != float("inf") and batches % self.batches_per_rollout:
            raise ValueError(
                f"an epoch of {batches} training batches ends inside a rollout; allowed: a multiple of model.mini_batches * "
                f"model.num_iterations={self.batches_per_rollout} (trainer.limit_train_batches, data.train_size)"
            )

    def _check_gap(self, gap: float) -> None:
        if not gap <= self.ratio_tolerance:
            raise RuntimeError(
                f"the first rollout's policy ratio is off by {gap:.3g}; allowed: model.ratio_tolerance={self.ratio_tolerance:g}."
                " Sampler and training code disagree about the policy: other position ids, another processor, dropout, or low"
                " precision (bfloat16 alone may reach 0.1: raise model.ratio_tolerance only then)"
            )

    # --------------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what trains."""
        if "state_dict" in checkpoint:
            checkpoint["state_dict"] = trainable_state(self, checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of something else."""
        if "state_dict" in checkpoint:
            check_trainable_state(self, checkpoint["state_dict"])
