"""One rollout, as the paper draws it (arXiv 2509.09666): an auto-encoder whose latent is text.

    image --Captioner--> G captions --Conditioner--> condition --Renderer--> G reconstructions --Reward--> r --> advantage

`autoencode` is the left part of the figure, up to the reconstructions; `roll_out` is all of it, plus the log-probs that
the loss compares with. Nothing here has a gradient.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, distributed

from uae.grpo import group_advantages
from uae.rewards import WeightedReward
from uae.types import UMM, Captioner, ImageBatch, Rewards, Rollout, Sampling


@dataclass(frozen=True)
class Plan:
    """How images become experience.

    Args:
        group: G, captions per image.
        sampling: How captions are drawn.
        seed: Of the run. Every random number follows from it, the image's id and the step.
        shared_noise: The renderer starts from the same noise for all captions of an image, so that differences in
            reward come from the captions.
        advantage_scale: What the centred reward is divided by, see `uae.grpo.group_advantages`.
        instruction: Question put beside every image; None is the captioner's own.
        mini_batches: Parts that the update will take the images in, so that old log-probs come from the same shapes.
    """

    group: int
    sampling: Sampling
    seed: int = 0
    shared_noise: bool = True
    advantage_scale: Literal["group", "batch", "none"] = "group"
    instruction: str | None = None
    mini_batches: int = 1


@dataclass(frozen=True)
class Experience:
    """What one rollout taught. Filled by `roll_out`, read by the loss, the logs and the callbacks."""

    id_B: Tensor
    rollout: Rollout  # its logp_NT is the replay, see `roll_out`
    reconstructions_NCHW: Tensor
    rewards: Rewards
    advantage_BG: Tensor
    reference_logp_NT: Tensor | None  # None where the loss has no KL
    sampler_gap: float  # largest |ratio - 1| between replay and sampler, over unmasked tokens
    seconds: dict[str, float] = field(default_factory=dict)  # per stage

    def select(self, images: Sequence[int]) -> Experience:
        """The experience of some of its images; whole groups, in the order given."""
        images, group = list(images), self.rollout.group
        rows = [image * group + g for image in images for g in range(group)]
        parts = {name: part_BG[images] for name, part_BG in self.rewards.parts.items()}
        return replace(
            self,
            id_B=self.id_B[images],
            rollout=self.rollout.select(images),
            reconstructions_NCHW=self.reconstructions_NCHW[rows],
            rewards=Rewards(self.rewards.reward_BG[images], parts),
            advantage_BG=self.advantage_BG[images],
            reference_logp_NT=None if self.reference_logp_NT is None else self.reference_logp_NT[rows],
        )


@torch.no_grad()
def roll_out(umm: UMM, reward: WeightedReward, batch: ImageBatch, plan: Plan, step: int, reference: bool) -> Experience:
    """Caption, reconstruct, reward, compare.

    The update compares its log-probs with a *replay* by the same code on the same mini-batches, so that the ratio is
    exactly one before the first update. The distance of the replay from what the sampler saw is ``sampler_gap``.

    Args:
        umm: Captioner, conditioner and renderer.
        reward: Scores reconstructions against their sources.
        batch: ``image`` [B, 3, H, W] and ``id`` [B].
        plan: How; see `Plan`.
        step: Number of this rollout since the start of the run; part of every seed.
        reference: Whether the loss needs log-probs of the reference.
    """
    watch = Stopwatch()
    rollout, reconstructions_NCHW = autoencode(umm, batch, plan, step, watch)
    with watch("reward"):
        rewards = reward(batch["image"], reconstructions_NCHW, rollout.texts)
        advantage_BG = compare(rewards.reward_BG, plan.advantage_scale)
    with watch("replay"):
        old_logp_NT = replay(umm.captioner, rollout, plan.mini_batches)
    reference_logp_NT = None
    if reference:
        with watch("reference"), umm.captioner.reference():
            reference_logp_NT = replay(umm.captioner, rollout, plan.mini_batches)
    gap = ((old_logp_NT - rollout.logp_NT).exp() - 1).abs().masked_fill(rollout.mask_NT == 0, 0.0).max().item()
    rollout = replace(rollout, logp_NT=old_logp_NT)
    return Experience(
        batch["id"], rollout, reconstructions_NCHW, rewards, advantage_BG, reference_logp_NT, gap, watch.seconds
    )


@torch.no_grad()
def autoencode(
    umm: UMM, batch: ImageBatch, plan: Plan, step: int, watch: Stopwatch | None = None
) -> tuple[Rollout, Tensor]:
    """Images through text and back: the captions, and their reconstructions ``[N, 3, H, W]``."""
    if "image" not in batch or "id" not in batch:
        raise ValueError(
            f"a batch has {sorted(batch)}, but needs image and id: use a data module of uae.data or add them"
        )
    watch = watch or Stopwatch()
    ids, group = batch["id"].tolist(), plan.group
    with watch("caption"):
        context = umm.captioner.prepare(batch["image"], plan.instruction)
        rollout = umm.captioner.sample(context, group, plan.sampling, caption_seeds(plan, ids, step))
    with watch("condition"):
        condition = umm.conditioner.encode(rollout.texts, rollout)
    with watch("render"):
        reconstructions_NCHW = umm.renderer.render(condition, noise_seeds(plan, ids, step))
    return rollout, reconstructions_NCHW


def compare(reward_BG: Tensor, scale: Literal["group", "batch", "none"]) -> Tensor:
    """``advantage_BG``. The std of ``batch`` spans the rollouts of all ranks, which hold equally many images."""
    if scale != "batch" or not distributed.is_initialized():
        return group_advantages(reward_BG, scale)
    everyone = [torch.empty_like(reward_BG) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyone, reward_BG.contiguous())
    return group_advantages(torch.cat(everyone), scale).chunk(len(everyone))[distributed.get_rank()]


def replay(captioner: Captioner, rollout: Rollout, mini_batches: int) -> Tensor:
    """Log-probs ``[N, T]`` under the captioner's current weights, computed exactly as the update will."""
    images = len(rollout) // rollout.group
    return torch.cat([captioner.logprobs(rollout.select(part)) for part in parts(images, mini_batches)])


def parts(images: int, mini_batches: int) -> list[range]:
    """Image numbers of each mini-batch: equal, contiguous, whole groups."""
    if images % mini_batches:
        raise ValueError(
            f"a rank's batch of {images} images cannot be split into model.mini_batches={mini_batches} equal parts; "
            "allowed: a divisor of data.batch_size (per rank), and full batches only"
        )
    size = images // mini_batches
    return [range(start, start + size) for start in range(0, images, size)]


def caption_seeds(plan: Plan, ids: Sequence[int], step: int) -> list[int]:
    """One seed per row (N): captions of one image differ."""
    return [seed_of(plan.seed, image, step, "caption", g) for image in ids for g in range(plan.group)]


def noise_seeds(plan: Plan, ids: Sequence[int], step: int) -> list[int]:
    """One seed per row (N) for the renderer, equal within a group where the noise is shared."""
    if plan.shared_noise:
        return [seed_of(plan.seed, image, step) for image in ids for _ in range(plan.group)]
    return [seed_of(plan.seed, image, step, "noise", g) for image in ids for g in range(plan.group)]


def seed_of(*key: int | str) -> int:
    """A 63-bit seed that depends on its key only: not on the rank, the batch or Python's salted hash."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Stopwatch:
    """Seconds per stage. Waits for the device on both sides, so that every stage pays for its own work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a ``with`` block."""
        start = now()
        yield
        self.seconds[stage] = now() - start


def now() -> float:
    """Seconds on a steady clock, once the device has finished what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
