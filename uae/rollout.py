"""One rollout, as the paper draws it (arXiv 2509.09666): an auto-encoder whose latent is text.

    image --Captioner--> G captions --Conditioner--> condition --Renderer--> reconstructions --Reward--> r --> advantage

`autoencode` is the left part of the figure, up to the reconstructions; `roll_out` is all of it, plus the log-probs that
the loss compares with: of the captions, of what the renderer did, or of both. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, distributed

from uae.grpo import group_advantages
from uae.rewards import WeightedReward
from uae.seeds import caption_seeds, noise_seeds
from uae.stopwatch import Stopwatch
from uae.types import UMM, Captioner, ImageBatch, ImagePolicy, Rewards, Rollout, Sampling, Trajectory

Train = Literal["captions", "images", "both"]
SEGMENTS = {"captions": ("caption",), "images": ("image",), "both": ("caption", "image")}


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
        train: Whose actions are compared: the captioner's, the renderer's, or both.
        reconstructions: M, images drawn of every caption. A caption's reward is their mean.
    """

    group: int
    sampling: Sampling
    seed: int = 0
    shared_noise: bool = True
    advantage_scale: Literal["group", "batch", "none"] = "group"
    instruction: str | None = None
    mini_batches: int = 1
    train: Train = "captions"
    reconstructions: int = 1


@dataclass(frozen=True)
class Segment:
    """What the loss reads of one policy's actions: caption tokens, image tokens or denoising steps; R rows of S."""

    policy: Captioner | ImagePolicy
    actions: Rollout | Trajectory
    old_logp_RS: Tensor
    mask_RS: Tensor
    advantage_R: Tensor
    reference_logp_RS: Tensor | None = None  # None where the loss has no KL

    def select(self, images: Sequence[int], per_image: int) -> Segment:
        """The segment of some images, each with ``per_image`` rows."""
        rows = rows_of(images, per_image)
        return replace(
            self,
            actions=_part(self.actions, images, per_image),
            old_logp_RS=self.old_logp_RS[rows],
            mask_RS=self.mask_RS[rows],
            advantage_R=self.advantage_R[rows],
            reference_logp_RS=None if self.reference_logp_RS is None else self.reference_logp_RS[rows],
        )


@dataclass(frozen=True)
class Experience:
    """What one rollout taught. Filled by `roll_out`, read by the loss, the logs and the callbacks."""

    id_B: Tensor
    rollout: Rollout  # its logp_NT is the replay, see `roll_out`, where captions train
    reconstructions_NCHW: Tensor  # with M > 1: N*M rows, those of a caption in a row
    rewards: Rewards  # of captions: means over M
    advantage_BG: Tensor
    segments: dict[str, Segment]  # of what trains: "caption", "image"
    sampler_gap: float  # largest |ratio - 1| between replay and sampler, over all actions that train
    seconds: dict[str, float] = field(default_factory=dict)  # per stage

    def select(self, images: Sequence[int]) -> Experience:
        """The experience of some of its images; whole groups, in the order given."""
        images, count = list(images), len(self.id_B)
        drawn = self.reconstructions_NCHW[rows_of(images, len(self.reconstructions_NCHW) // count)]
        parts = {name: part_BG[images] for name, part_BG in self.rewards.parts.items()}
        return replace(
            self,
            id_B=self.id_B[images],
            rollout=self.rollout.select(images),
            reconstructions_NCHW=drawn,
            rewards=Rewards(self.rewards.reward_BG[images], parts),
            advantage_BG=self.advantage_BG[images],
            segments={name: one.select(images, len(one.mask_RS) // count) for name, one in self.segments.items()},
        )


@torch.no_grad()
def roll_out(
    umm: UMM, reward: WeightedReward, batch: ImageBatch, plan: Plan, step: int, references: Collection[str] = ()
) -> Experience:
    """Caption, reconstruct, reward, compare.

    The update compares its log-probs with a *replay* by the same code on the same mini-batches, so that the ratio is
    exactly one before the first update. The distance of the replay from what the sampler saw is ``sampler_gap``.

    Args:
        umm: Captioner, conditioner and renderer.
        reward: Scores reconstructions against their sources.
        batch: ``image`` [B, 3, H, W] and ``id`` [B].
        plan: How; see `Plan`.
        step: Number of this rollout since the start of the run; part of every seed.
        references: Segments whose loss needs log-probs of the reference.
    """
    watch = Stopwatch()
    rollout, reconstructions_NCHW, trajectory = autoencode(umm, batch, plan, step, watch)
    with watch("reward"):
        texts = [text for text in rollout.texts for _ in range(plan.reconstructions)]
        rewards, advantage_BG, drawn_advantage_R = credit(reward(batch["image"], reconstructions_NCHW, texts), plan)
    taken: dict[str, tuple[Captioner | ImagePolicy, Rollout | Trajectory, Tensor, Tensor]] = {}
    if plan.train != "images":
        taken["caption"] = umm.captioner, rollout, rollout.logp_NT, advantage_BG.flatten()
    if trajectory is not None:
        taken["image"] = umm.renderer, trajectory, trajectory.logp_NS, drawn_advantage_R  # type: ignore[assignment]
    segments, gap = {}, 0.0
    for name, (policy, actions, sampled_RS, advantage_R) in taken.items():
        mask_RS = actions.mask_NT if isinstance(actions, Rollout) else actions.mask_NS
        with watch("replay"):
            old_RS = replay(policy, actions, len(batch["id"]), plan.mini_batches)
        reference_RS = None
        if name in references:
            with watch("reference"), policy.reference():
                reference_RS = replay(policy, actions, len(batch["id"]), plan.mini_batches)
        segments[name] = Segment(policy, actions, old_RS, mask_RS, advantage_R, reference_RS)
        gap = max(gap, ((old_RS - sampled_RS).exp() - 1).abs().masked_fill(mask_RS == 0, 0.0).max().item())
    if "caption" in segments:
        rollout = replace(rollout, logp_NT=segments["caption"].old_logp_RS)
    return Experience(
        batch["id"], rollout, reconstructions_NCHW, rewards, advantage_BG, segments, gap, watch.seconds
    )


@torch.no_grad()
def autoencode(
    umm: UMM, batch: ImageBatch, plan: Plan, step: int, watch: Stopwatch | None = None
) -> tuple[Rollout, Tensor, Trajectory | None]:
    """Images through text and back: captions, reconstructions ``[N*M, 3, H, W]``, and the renderer's actions if it trains."""
    if "image" not in batch or "id" not in batch:
        raise ValueError(
            f"a batch has {sorted(batch)}, but needs image and id: use a data module of uae.data or add them"
        )
    watch = watch or Stopwatch()
    ids = batch["id"].tolist()
    with watch("caption"):
        context = umm.captioner.prepare(batch["image"], plan.instruction)
        rollout = umm.captioner.sample(context, plan.group, plan.sampling, caption_seeds(plan, ids, step))
    with watch("condition"):
        condition = umm.conditioner.encode(rollout.texts, rollout)
    with watch("render"):
        if plan.reconstructions > 1:
            condition = condition.index([n for n in range(len(condition)) for _ in range(plan.reconstructions)])
        seeds = noise_seeds(plan, ids, step)
        if plan.train == "captions":
            return rollout, umm.renderer.render(condition, seeds), None
        explorer: ImagePolicy = umm.renderer  # type: ignore[assignment]
        trajectory = explorer.sample(condition, seeds)
        return rollout, explorer.pixels(trajectory), trajectory


def credit(each: Rewards, plan: Plan) -> tuple[Rewards, Tensor, Tensor]:
    """Who is to thank for a reward: rewards of captions, ``advantage_BG`` of captions, ``[N*M]`` of reconstructions.

    A caption is compared with the other captions of its image, by the mean over its reconstructions. A reconstruction is
    compared with the others of its caption; where there is one only, it shares its caption's advantage.
    """
    B, M = len(each.reward_BG), plan.reconstructions
    rewards = Rewards(
        each.reward_BG.view(B, -1, M).nanmean(2), {name: part.view(B, -1, M).nanmean(2) for name, part in each.parts.items()}
    )
    advantage_BG = compare(rewards.reward_BG, plan.advantage_scale)
    if M == 1:
        return rewards, advantage_BG, advantage_BG.flatten()
    return rewards, advantage_BG, compare(each.reward_BG.view(-1, M), plan.advantage_scale).flatten()


def compare(reward_BG: Tensor, scale: Literal["group", "batch", "none"]) -> Tensor:
    """``advantage_BG``. The std of ``batch`` spans the rollouts of all ranks, which hold equally many images."""
    if scale != "batch" or not distributed.is_initialized():
        return group_advantages(reward_BG, scale)
    everyone = [torch.empty_like(reward_BG) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyone, reward_BG.contiguous())
    return group_advantages(torch.cat(everyone), scale).chunk(len(everyone))[distributed.get_rank()]


def replay(policy: Captioner | ImagePolicy, actions: Rollout | Trajectory, images: int, mini_batches: int) -> Tensor:
    """Log-probs ``[R, S]`` under the policy's current weights, computed exactly as the update will."""
    per_image = len(actions) // images
    return torch.cat([policy.logprobs(_part(actions, part, per_image)) for part in parts(images, mini_batches)])  # type: ignore[arg-type]


def parts(images: int, mini_batches: int) -> list[range]:
    """Image numbers of each mini-batch: equal, contiguous, whole groups."""
    if images % mini_batches:
        raise ValueError(
            f"a rank's batch of {images} images cannot be split into model.mini_batches={mini_batches} equal parts; "
            "allowed: a divisor of data.batch_size (per rank), and full batches only"
        )
    size = images // mini_batches
    return [range(start, start + size) for start in range(0, images, size)]


def rows_of(images: Sequence[int], per_image: int) -> list[int]:
    """Row numbers of some images."""
    return [image * per_image + row for image in images for row in range(per_image)]


def _part(actions: Rollout | Trajectory, images: Sequence[int], per_image: int) -> Rollout | Trajectory:
    if isinstance(actions, Rollout):
        return actions.select(images)
    return actions.select(rows_of(images, per_image))
