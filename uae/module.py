"""Unified-GRPO as a LightningModule: what `uae.rollout` collected becomes a loss, and the rest is bookkeeping.

Optimisation is Lightning's own (automatic): accumulation, clipping, schedulers and checkpoints by step work as anywhere.
One rollout feeds ``mini_batches * num_iterations`` training steps; the data module yields its batch that many times.

Where this differs from the paper (arXiv 2509.09666): old log-probs are computed by training code rather than taken from the
sampler, a group shares the renderer's noise, and the KL term is off by default.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import Metric

from uae import measure
from uae.checkpoints.adapters import ADAPTERS, adapters_of, check_adapters
from uae.checkpoints.resuming import begin_resumed, note_settings, resumable
from uae.checkpoints.trainable import check_trainable_state, trainable_state
from uae.evaluation import AutoEncoder
from uae.groups import Filtering, Order
from uae.grpo import Correction, GRPOLoss
from uae.metrics import UnifiedScore
from uae.models.finetune import Finetune, check_resolution
from uae.models.flow.policy import Exploration
from uae.policies import learners, prepare, roots
from uae.rewards import WeightedReward
from uae.rollout import SEGMENTS, Experience, Plan, Segment, Train, parts, roll_out, split
from uae.stopwatch import now
from uae.strategy import FSDP2Strategy, refuse_other_sharding
from uae.trainer import batch_size, check_precision, is_dry_run
from uae.types import ImageBatch, Sampling, System
from uae.windows import check_epoch, check_windows, close_window, counted, ends_epoch, normalizer, threshold_of


class UnifiedGRPO(AutoEncoder):
    """Trains a captioner so that its captions can be drawn.

    Args:
        system: What to assemble; built in ``configure_model``.
        reward: What a reconstruction is worth.
        finetune: What trains in the captioner, or in the one network that captions and draws: ``LoRA`` or ``Full``.
        loss: The clipped loss, see `uae.grpo.GRPOLoss`.
        sampling: How captions are drawn in training; this defines the policy.
        group: G, captions per image, 2 or more.
        advantage_scale: Divide centred rewards by the std of the "group", of the "batch" (all ranks), or by nothing.
        advantage_order: Compare the weighted sum of the reward's parts, or every part by itself (GDPO), see `uae.groups.credit`.
        filtering: Which groups are drawn again, and which captions the loss leaves out, see `uae.groups.Filtering`.
        correction: Weights of actions for the gap between sampler and training code, see `uae.grpo.Correction`; None is 1.
        train: Whose actions the reward teaches: "captions" (generation for understanding), "images" (understanding for
            generation: image tokens, or the steps of a diffusion renderer), or "both".
        reconstructions: M, images drawn of every caption. A caption's reward is their mean; a renderer's images are
            compared within their caption, or, where M is 1, share their caption's advantage.
        image_loss: Loss of the renderer's actions; None is ``loss``. Diffusion steps need clip ranges near 1e-4, see
            `uae.models.flow.sde`.
        image_weight: Weight of the images' loss; the weight of the captions' loss is 1. Each is normalised over its own
            actions.
        image_finetune: What trains in a renderer with weights of its own.
        image_lr: Learning rate of a renderer with weights of its own; None is the optimizer's.
        exploration: How a diffusion renderer explores, if it trains.
        mini_batches: Number of parts that a rank's batch is updated in; must divide ``data.init_args.batch_size``. Old
            log-probs are computed in the same parts.
        num_iterations: Passes over every rollout.
        shared_noise: The renderer's noise is the same within a group, so that only captions make a difference.
        optimizer: Optimizer of the trainable parameters.
        scheduler: Schedule of the learning rate; it counts optimizer steps.
        unified_score: Computed on validation and test images, logged as ``unified_score/<name>``.
        metrics: More metrics, with ``update(texts, reconstructions, batch)`` and a ``compute`` that returns values by tag.
        ratio_tolerance: Largest |ratio - 1| between sampler and training code on a run's first rollout. float32 stays
            near 1e-6; bfloat16 may need 0.1.
        instruction: Question put beside every image; None is the system's own.
        validation_temperature: Temperature of the captions in validation, test and prediction; 0 is greedy.
        seed: Seed of captions, renderer noise and the adapter's start. Every random number follows from it, the image's id
            and the step.
    """

    def __init__(
        self,
        system: System,
        reward: WeightedReward,
        finetune: Finetune,
        loss: GRPOLoss = GRPOLoss(),  # noqa: B008 (frozen)
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        group: int = 8,
        advantage_scale: Literal["group", "batch", "none"] = "group",
        advantage_order: Order = "sum_then_normalize",
        filtering: Filtering = Filtering(),  # noqa: B008 (frozen)
        correction: Correction | None = None,
        train: Train = "captions",
        reconstructions: int = 1,
        image_loss: GRPOLoss | None = None,
        image_weight: float = 1.0,
        image_finetune: Finetune | None = None,
        image_lr: float | None = None,
        exploration: Exploration | None = None,
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
        evaluation = Plan(group=1, sampling=greedy, seed=seed, instruction=instruction)
        super().__init__(reward, evaluation, unified_score, metrics)
        for key, value, least in (
            ("group", group, 2), ("mini_batches", mini_batches, 1), ("num_iterations", num_iterations, 1),
            ("reconstructions", reconstructions, 1),
        ):  # fmt: skip
            if value < least:
                raise ValueError(f"model.init_args.{key}={value}; allowed: {least} or more")
        if sampling.temperature == 0:
            raise ValueError("model.init_args.sampling.temperature=0 makes all captions of an image equal; allowed: above 0")
        self.system, self.finetune = system, finetune
        if image_finetune is not None:
            image_finetune.key = "model.init_args.image_finetune.init_args"
        self.image_finetune, self.image_lr, self.exploration = image_finetune, image_lr, exploration
        self.losses = {"caption": loss, "image": image_loss or loss}
        self.weights = {"caption": 1.0, "image": image_weight}
        self.plan = Plan(
            group=group,
            sampling=sampling,
            seed=seed,
            shared_noise=shared_noise,
            advantage_scale=advantage_scale,
            advantage_order=advantage_order,
            filtering=filtering,
            instruction=instruction,
            mini_batches=mini_batches,
            train=train,
            reconstructions=reconstructions,
        )
        self.num_iterations, self.ratio_tolerance, self.correction = num_iterations, ratio_tolerance, correction
        self.optimizer, self.scheduler = optimizer, scheduler
        self.experience: Experience | None = None
        self.seconds: Counter[str] = Counter()  # of all rollouts and updates so far, by stage
        self._first_rollout, self._mini_batches = True, list[dict[str, Segment[Any]]]()
        self.strict_loading = False  # on_load_checkpoint is stricter

    # ---------------------------------------------------------------------------------------------------- training

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Rollout, log-probs, loss, log."""
        turn = batch_idx % self.batches_per_rollout
        if turn == 0 or self.experience is None:
            self._collect(batch, batch_idx)
        losses = []
        for name, segment in self._mini_batch(batch, turn).items():
            logp_RS = segment.logprobs()
            terms = self.losses[name](
                logp_RS, segment.since_rollout(logp_RS), segment.advantage_R, segment.mask_RS, segment.reference_logp_RS,
                self._normalizer(name, batch_idx), segment.weights(self.correction), segment.actions.entropy_RS,
                self._thresholds[name],
            )  # fmt: skip
            seen = self._log_all(measure.of_update(name, terms, logp_RS, segment, self.correction))
            if self._first_rollout:
                measure.check_gap(seen, self.ratio_tolerance)
            losses.append(terms.loss * self.weights[name])
        return torch.stack(losses).sum()

    @property
    def batches_per_rollout(self) -> int:
        """How many times in a row the data module must yield every batch."""
        return self.plan.mini_batches * self.num_iterations

    @property
    def at_rollout_boundary(self) -> bool:
        """Whether rollout and optimizer step are complete: a checkpoint taken now resumes exactly."""
        ready = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        stepped = ready % self.trainer.accumulate_grad_batches == 0 or ends_epoch(self.trainer)
        return ready % self.batches_per_rollout == 0 and stepped

    def _collect(self, batch: ImageBatch, batch_idx: int) -> None:
        """Roll out, and prepare the mini-batches of the update."""
        if batch_idx % self.batches_per_rollout:
            warnings.warn(
                f"the run continues inside a rollout, at step {self.global_step}: its captions are drawn again, by the weights of "
                "this step, so the run is not equal to one that was never stopped",
                stacklevel=2,
            )
        accumulate = self.trainer.accumulate_grad_batches
        step = (self.global_step * accumulate + batch_idx % accumulate) // self.batches_per_rollout
        before_a_step = range(batch_idx, batch_idx + accumulate - batch_idx % accumulate)
        self._first_rollout, self._mini_batches = self.experience is None, []  # those of before need not be in memory
        with self.whole_policies():
            self.experience = roll_out(self.umm, self.reward, batch, self.plan, step, self.references)
            on_policy = {number % self.plan.mini_batches for number in before_a_step}
            self._mini_batches = split(self.experience, self.plan.mini_batches, on_policy)
        self.seconds.update(self.experience.seconds)
        self._actions_M = {name: self._count(name, one) for name, one in self.experience.segments.items()}
        self._thresholds = {
            name: threshold_of(self.losses[name], one.actions.entropy_RS, one.mask_RS)
            for name, one in self.experience.segments.items()
        }
        self._log_all(
            measure.of_rollout(self.experience, self.plan.sampling.max_tokens)
            | {"condition/truncated": float(self.umm.conditioner.truncated)}  # captions since the start of the run
        )
        self._collected_at = now()

    def _mini_batch(self, batch: ImageBatch, turn: int) -> dict[str, Segment[Any]]:
        assert self.experience is not None, "`training_step` has collected it"
        if not torch.equal(batch["id"], self.experience.id_B):
            raise RuntimeError(
                f"the batch changed within a rollout; with model.init_args.mini_batches * model.init_args.num_iterations="
                f"{self.batches_per_rollout} the data module must yield every batch that many times in a row"
            )
        return self._mini_batches[turn % self.plan.mini_batches]

    @property
    def references(self) -> list[str]:
        """Segments whose loss has a KL to the start."""
        return [name for name, loss in self.losses.items() if loss.beta > 0 and name in SEGMENTS[self.plan.train]]

    def _count(self, name: str, segment: Segment[Any]) -> Tensor:
        """What the loss divides by in every mini-batch; of all ranks where they share it."""
        loss = self.losses[name]
        actions_M = counted(loss, segment.mask_RS, self.plan.mini_batches)
        if loss.window == "global" or (loss.window == "none" and self.plan.filtering.drops):
            return self._gathered(actions_M).view(-1, self.plan.mini_batches).sum(0)
        return actions_M

    def _normalizer(self, name: str, batch_idx: int) -> Tensor | None:
        window = self.losses[name].window
        if window == "none" and not self.plan.filtering.drops:
            return None  # all rows of every mini-batch
        return normalizer(self.trainer, self._actions_M[name], batch_idx, 1 if window == "local" else self.trainer.world_size)

    def on_train_batch_start(self, batch: ImageBatch, batch_idx: int) -> None:
        """Refuse data whose length nobody knew, if they end inside a rollout, before an optimizer step is taken from its parts.

        Raises:
            RuntimeError: The data do end there.
        """
        if ends_epoch(self.trainer) and (batch_idx + 1) % self.batches_per_rollout and not is_dry_run(self.trainer):
            raise RuntimeError(
                f"the data ended inside a rollout, after {batch_idx + 1} batches of an epoch; allowed: a multiple of "
                f"model.init_args.mini_batches * model.init_args.num_iterations={self.batches_per_rollout}, as data.class_path must "
                "yield every batch that many times in a row"
            )

    def on_after_backward(self) -> None:
        """Let every batch of an optimizer step count the same, also where an epoch ends inside an accumulation window."""
        close_window(self)

    def on_train_batch_end(self, outputs: Any, batch: ImageBatch, batch_idx: int) -> None:
        """Log what the update took: from the end of the rollout to the end of its last optimizer step."""
        if (batch_idx + 1) % self.batches_per_rollout == 0:
            seconds = now() - self._collected_at
            self.seconds.update({"update": seconds})
            self.log("time/update", seconds)

    def configure_optimizers(self) -> Any:
        """Trainable parameters only; the scheduler counts optimizer steps."""
        rates = {"policy": None, "image_policy": self.image_lr}
        groups: list[dict[str, Any]] = []
        for name, learner in learners(self.umm, self.plan.train).items():
            rate = {} if rates[name] is None else {"lr": rates[name]}
            groups.append({"params": [p for p in learner.network.parameters() if p.requires_grad], **rate})
        optimizer = self.optimizer([group for group in groups if group["params"]])
        return resumable(optimizer, None if self.scheduler is None else self.scheduler(optimizer))

    def _gathered(self, values: Tensor) -> Tensor:
        """The values of all ranks, stacked where there are several."""
        everyone: Any = self.all_gather(values)
        return torch.as_tensor(everyone)

    def _log_all(self, values: dict[str, Tensor | float]) -> dict[str, Tensor]:
        """Log over all ranks, with one collective for everything."""
        mine_K = torch.stack([torch.as_tensor(v, dtype=torch.float32, device=self.device) for v in values.values()])
        merged = measure.over_ranks(values, self._gathered(mine_K))
        for name, value in merged.items():
            self.log(name, value, prog_bar=name == "reward/mean")
        return merged

    # ---------------------------------------------------------------------------------------------------------- setup

    def setup(self, stage: str) -> None:
        """Refuse what could only fail, or silently be wrong, later."""
        refuse_other_sharding(self.trainer.strategy)
        check_precision(self.trainer)
        if stage != "fit":
            return
        self.experience = None
        size = batch_size(self.trainer)
        if size is not None:
            parts(size, self.plan.mini_batches)
        losses = [self.losses[name] for name in SEGMENTS[self.plan.train]]
        check_windows(self.trainer, self.batches_per_rollout, losses, self.plan.filtering.drops)

    def configure_model(self) -> None:
        """Build the system, decide what trains, load the encoders, shard where the strategy asks for it. Idempotent."""
        if self._umm is not None:
            return
        train, umm = self.plan.train, self.system.build()
        with torch.random.fork_rng(devices=[]):  # the adapter's start is the same on every rank
            torch.manual_seed(self.plan.seed)
            umm = prepare(umm, train, self.references, self.finetune, self.image_finetune, self.exploration)
        self.reward.load()
        if self.unified_score is not None:
            self.unified_score.load()
        if self.device_mesh is not None:
            strategy = self.trainer.strategy
            assert isinstance(strategy, FSDP2Strategy), "`setup` refuses all others that have a mesh"
            for root in roots(umm, train):
                strategy.shard(root)
        self._umm = umm
        for name, learner in learners(umm, train).items():
            setattr(self, name, learner.network)

    def on_fit_start(self) -> None:
        """Refuse weights that would not keep small updates."""
        check_resolution({"reading.dtype": self.policy, "rendering.placement.dtype": self.image_policy})
        super().on_fit_start()

    def on_train_start(self) -> None:
        """Refuse an epoch that would end inside a rollout, unless it is a dry run of which nothing is kept."""
        check_epoch(self.trainer, self.batches_per_rollout)

    # --------------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what trains, and the settings."""
        if self._trainer is not None:
            note_settings(self._trainer, checkpoint)
        checkpoint[ADAPTERS] = adapters_of(self)
        if "state_dict" in checkpoint:
            checkpoint["state_dict"] = trainable_state(self, checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of something else."""
        path = None if self._trainer is None else self._trainer.ckpt_path
        check_adapters(self, checkpoint, path)
        if "state_dict" in checkpoint:
            check_trainable_state(self, checkpoint["state_dict"], path)
        if self._trainer is not None:
            begin_resumed(self._trainer, checkpoint)
