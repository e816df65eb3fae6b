"""Skips updates that are not finite, and warns of a run that goes wrong, with the keys to change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

Sign = Literal["entropy", "kl", "ratio", "sampler_gap", "zero_variance", "reward_hacking"]
Seen = tuple[Sign, str, bool, str]  # sign, tag of the number, whether it is bad, and the reason as text

LR = "model.init_args.optimizer.init_args.lr"
ADVICE: dict[Sign, str] = {
    "entropy": f"raise model.init_args.sampling.temperature or model.init_args.loss.beta, or lower {LR}",
    "kl": f"raise model.init_args.loss.beta or lower {LR}",
    "ratio": f"lower {LR}, model.init_args.num_iterations or model.init_args.mini_batches, or set model.init_args.loss.delta",
    "sampler_gap": "sampler and training code give different log-probs: raise the precision (trainer.precision, the system's dtype), "
    "or raise model.init_args.ratio_tolerance if that is expected",
    "zero_variance": "nothing is learned from those: raise model.init_args.sampling.temperature or model.init_args.group, "
    "or check model.init_args.reward",
    "reward_hacking": "the reward is being gamed: take an earlier checkpoint, raise model.init_args.loss.beta or reward more "
    "encoders (model.init_args.reward)",
}
REASONS = {  # from the cause of a skipped update, earliest cause first, to advice
    "no reward of the rollout was finite, or one was infinite": "check model.init_args.reward and the reconstructions",
    "the loss was not finite": f"lower {LR}",
    "a gradient was not finite": f"lower {LR} or raise the precision (trainer.precision)",
}


class Health(Callback):
    """Skips updates that are not finite, and warns when logged numbers show that a run goes wrong.

    An update is skipped on *all* ranks if its loss, a gradient or the rewards of its rollout are not finite on *any* rank.
    Then the weights, the state of the optimizer and its number of steps stay as they are; the learning-rate schedule and
    Lightning's step go on. ``health/skipped_updates`` counts skipped updates, and too many in a row stop the run. A single
    missing reward (NaN) does not skip an update: its row is left out of the advantages.

    The other checks look at numbers that `uae.measure` logs and that are equal on all ranks, so they need no communication.
    A check warns, or stops the run if ``stop_on`` names it, when its number is bad for ``patience`` rollouts in a row. Reward
    hacking is checked at validations instead. A limit of None turns a check off.

    Args:
        patience: Number of consecutive rollouts with a bad number before a check warns. The mean entropy of as many rollouts
            at the start is the one that ``min_entropy`` compares with.
        max_skipped: Number of consecutive skipped updates at which the run stops.
        max_kl: Largest ``policy/kl`` and ``image_policy/kl``, in nats per action; logged if a loss has a KL term.
        min_entropy: Smallest ``policy/entropy``, as a share of the mean over the first rollouts.
        max_zero_variance: Share of groups whose rewards are all equal at which the check warns, above 0 and at most 1.
        max_ratio: Largest ``policy/ratio_max`` and ``image_policy/ratio_max`` at the end of a rollout.
        reward_rise: Reward hacking is a rise of ``val_reward/mean`` by more than this, together with a fall by
            ``held_out_fall``, both since the validation with the best held-out score.
        held_out_fall: Fall of ``unified_score/held_out`` above which a rise by ``reward_rise`` is reward hacking.
        stop_on: Checks that stop the run instead of warning: "entropy", "kl", "ratio", "sampler_gap" (log-probs of sampler
            and training code differ; the first rollout is always checked), "zero_variance", "reward_hacking".
    """

    def __init__(
        self,
        patience: int = 10,
        max_skipped: int = 10,
        max_kl: float | None = 1.0,
        min_entropy: float | None = 0.05,
        max_zero_variance: float | None = 1.0,
        max_ratio: float | None = 100.0,
        reward_rise: float = 0.01,
        held_out_fall: float | None = 0.02,
        stop_on: Sequence[Sign] = (),
    ) -> None:
        for key, value in (("patience", patience), ("max_skipped", max_skipped)):
            if value < 1:
                raise ValueError(f"callbacks.health.Health {key}={value}; allowed: 1 or more")
        unknown = sorted(set(stop_on) - set(get_args(Sign)))
        if unknown:
            raise ValueError(f"callbacks.health.Health stop_on={unknown}; allowed: {', '.join(get_args(Sign))}")
        self.patience, self.max_skipped, self.stop_on = patience, max_skipped, tuple(stop_on)
        self.max_kl, self.max_ratio, self.max_zero_variance = max_kl, max_ratio, max_zero_variance
        self.min_entropy, self.reward_rise, self.held_out_fall = min_entropy, reward_rise, held_out_fall
        self.skipped = self.in_a_row = 0  # updates
        self.first_entropies: list[float] = []
        self.best: dict[str, float] = {}  # the validation with the best held-out score
        self._shown: dict[str, int] = {}  # rollouts in a row, per tag
        self._experience: Any = None
        self._unrewarded = False
        self._losses: list[Tensor] = []  # of the batches since the last optimizer step

    def state_dict(self) -> dict[str, Any]:
        """The counts and the earlier numbers that a resumed run compares with."""
        return {name: getattr(self, name) for name in ("skipped", "in_a_row", "first_entropies", "best")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts of a resumed run."""
        for name, value in state_dict.items():
            setattr(self, name, value)

    # ---------------------------------------------------------------------------------------------- numbers not finite

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remember the loss and, once per rollout, whether its rewards are finite."""
        experience = getattr(pl_module, "experience", None)
        if experience is not None and experience is not self._experience:
            self._experience = experience
            reward = trainer.callback_metrics.get("reward/mean")  # NaN where no rank has a reward
            self._unrewarded = reward is not None and not math.isfinite(reward)
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Skip the update on all ranks if it is not finite on one of them. The ranks share three numbers for this."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        loss = torch.stack(self._losses).float()
        self._losses = []
        bad = [loss.new_tensor(self._unrewarded, dtype=torch.bool), ~loss.isfinite().all()]
        if trainer.precision != "16-mixed":  # its loss scaling makes infinite gradients and skips those steps
            bad.append(~_norm(gradients, loss).isfinite())
        worst = trainer.strategy.reduce(torch.stack(bad).float(), reduce_op="max")
        reason = next((reason for reason, seen in zip(REASONS, worst.tolist(), strict=False) if seen), None)
        self.in_a_row = 0 if reason is None else self.in_a_row + 1
        self.skipped += reason is not None
        if reason is not None:
            optimizer.zero_grad(set_to_none=True)  # a parameter without a gradient is left alone: no decay, no momentum
            self._say_skipped(trainer, reason)
        pl_module.log("health/skipped_updates", float(self.skipped))

    def _say_skipped(self, trainer: Trainer, reason: str) -> None:
        if self.in_a_row >= self.max_skipped:
            raise FloatingPointError(
                f"{reason} at step {trainer.global_step}: {self.in_a_row} updates in a row were skipped "
                f"({self.skipped} in all), allowed: fewer than max_skipped={self.max_skipped} of callbacks.health.Health; "
                f"{REASONS[reason]}"
            )
        rank_zero_warn(
            f"{reason} at step {trainer.global_step}: update skipped on all ranks ({self.in_a_row} in a row, "
            f"{self.skipped} in all); {REASONS[reason]}"
        )

    # ----------------------------------------------------------------------------------------------------------- signs

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Check the numbers when a rollout has been used up, because the policy then differs most from its sampler."""
        if (batch_idx + 1) % getattr(pl_module, "batches_per_rollout", 1) == 0:
            values = {tag: float(value) for tag, value in trainer.callback_metrics.items() if "/" in tag}
            for sign, tag, bad, why in self._signs(values, getattr(pl_module, "ratio_tolerance", math.inf)):
                self._shown[tag] = self._shown.get(tag, 0) + 1 if bad else 0
                if self._shown[tag] == self.patience:
                    self._tell(trainer, sign, f"{tag}={values[tag]:.3g} {why}, {self.patience} rollouts in a row")

    def _signs(self, values: dict[str, float], ratio_tolerance: float) -> Iterator[Seen]:
        above: list[tuple[Sign, str, str, float | None]] = []
        for policy in ("policy", "image_policy"):
            above.append(("sampler_gap", f"{policy}/sampler_gap", "model.init_args.ratio_tolerance", ratio_tolerance))
            above.append(("kl", f"{policy}/kl", "max_kl", self.max_kl))
            above.append(("ratio", f"{policy}/ratio_max", "max_ratio", self.max_ratio))
        for sign, tag, key, limit in above:
            if tag in values and limit is not None:
                yield sign, tag, values[tag] > limit, f"is above {key}={limit:g}"
        yield from self._zero_variance(values)
        yield from self._entropy(values)

    def _zero_variance(self, values: dict[str, float]) -> Iterator[Seen]:
        tag, limit = "reward/zero_variance", self.max_zero_variance
        if tag in values and limit is not None:
            why = f"(share of groups whose rewards are all the same) has reached max_zero_variance={limit:g}"
            yield "zero_variance", tag, values[tag] >= limit, why

    def _entropy(self, values: dict[str, float]) -> Iterator[Seen]:
        entropy = values.get("policy/entropy")
        if entropy is None or self.min_entropy is None:
            return
        if len(self.first_entropies) < self.patience:
            self.first_entropies.append(entropy)
        start = sum(self.first_entropies) / len(self.first_entropies)
        why = f"is below min_entropy={self.min_entropy:g} of the first rollouts' {start:.3g}"
        yield "entropy", "policy/entropy", entropy < self.min_entropy * start, why

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare with the validation that had the best held-out score."""
        metrics = trainer.callback_metrics
        if self.held_out_fall is None or not {"val_reward/mean", "unified_score/held_out"} <= set(metrics):
            return
        reward, held_out = float(metrics["val_reward/mean"]), float(metrics["unified_score/held_out"])
        best = self.best
        if not best or held_out > best["held_out"] or math.isnan(best["held_out"]):
            self.best = {"held_out": held_out, "reward": reward, "step": trainer.global_step}
        elif reward - best["reward"] > self.reward_rise and best["held_out"] - held_out > self.held_out_fall:
            self._tell(
                trainer,
                "reward_hacking",
                f"since step {best['step']} val_reward/mean rose from {best['reward']:.3f} to {reward:.3f} while "
                f"unified_score/held_out fell from {best['held_out']:.3f} to {held_out:.3f} (allowed: "
                f"held_out_fall={self.held_out_fall:g} where the reward rises by reward_rise={self.reward_rise:g})",
            )

    def _tell(self, trainer: Trainer, sign: Sign, seen: str) -> None:
        """Warn or stop the run. The numbers are equal on all ranks, so all ranks stop."""
        line = f"step {trainer.global_step}: {seen}; {ADVICE[sign]}"
        if sign in self.stop_on:
            raise RuntimeError(f"stopped by callbacks.health.Health stop_on={sign} at {line}")
        rank_zero_warn(line)


def _norm(gradients: list[Tensor], like: Tensor) -> Tensor:
    """Norm of the gradients, or of this rank's shards of them."""
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    return torch.nn.utils.get_total_norm(local).float() if local else like.new_zeros(())
