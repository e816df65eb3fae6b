"""One rollout, as the paper draws it (arXiv 2509.09666): an auto-encoder whose latent is text.

    image --Captioner--> G captions --Conditioner--> condition --Renderer--> reconstructions --Reward--> r --> advantage

`autoencode` is the left part of the figure, up to the reconstructions; `roll_out` is all of it; `split` cuts it into the
mini-batches of the update, with the log-probs that the loss compares with. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal

import torch
from torch import Tensor, distributed

from uae.grpo import group_advantages
from uae.rewards import WeightedReward
from uae.seeds import seed_of
from uae.stopwatch import Stopwatch
from uae.types import UMM, A, Actions, ImageBatch, Policy, Rewards, Rollout, Sampling, rows_of

Train = Literal["captions", "images", "both"]
SEGMENTS = {"captions": ("caption",), "images": ("image",), "both": ("caption", "image")}


@dataclass(frozen=True)
class Plan:
    """How images become experience. `uae.module.UnifiedGRPO` has these settings by the same names, and documents them."""

    group: int
    sampling: Sampling
    seed: int = 0
    shared_noise: bool = True
    advantage_scale: Literal["group", "batch", "none"] = "group"
    instruction: str | None = None
    mini_batches: int = 1
    train: Train = "captions"
    reconstructions: int = 1


@dataclass
class Segment(Generic[A]):
    """What the loss reads of one policy: its actions (R rows of S), how likely they were, and what they are worth.

    Args:
        policy: Who acted.
        actions: What it did.
        advantage_R: Advantage of each row, shared by its actions.
        reference_logp_RS: Log-probs under the weights the run started from; None where the loss has no KL term.
        old_logp_RS: Log-probs under the weights of the rollout, computed as the update computes them. None until they have
            been computed, see `split`.
    """

    policy: Policy[A]
    actions: A
    advantage_R: Tensor
    reference_logp_RS: Tensor | None = None
    old_logp_RS: Tensor | None = None

    def logprobs(self) -> Tensor:
        """Log-probs ``[R, S]`` of the actions under the policy's current weights, with gradient."""
        return self.policy.logprobs(self.actions)

    def since_rollout(self, logp_RS: Tensor) -> Tensor:
        """The old log-probs ``[R, S]``, which a ratio since the rollout is taken with.

        Args:
            logp_RS: Log-probs under the current weights. The first ones ever given are kept as the old ones, because nothing
                has been updated before.
        """
        if self.old_logp_RS is None:
            self.old_logp_RS = logp_RS.detach()
        return self.old_logp_RS

    def of(self, images: Sequence[int], per_image: int) -> Segment[A]:
        """The segment of some images, each with ``per_image`` rows."""
        rows = rows_of(images, per_image)
        return replace(
            self,
            actions=self.actions.of(images, per_image),
            advantage_R=self.advantage_R[rows],
            reference_logp_RS=None if self.reference_logp_RS is None else self.reference_logp_RS[rows],
            old_logp_RS=None if self.old_logp_RS is None else self.old_logp_RS[rows],
        )


@dataclass(frozen=True)
class Experience:
    """What one rollout taught. Filled by `roll_out`, read by the loss, the logs and the callbacks.

    Args:
        id_B: Ids of the images.
        rollout: The captions.
        reconstructions_NCHW: What was drawn of them. With M > 1 reconstructions there are N*M rows, those of a caption in
            a row.
        rewards: Rewards of captions, which are means over their reconstructions.
        advantage_BG: Advantages of captions.
        segments: What trains, by the names "caption" and "image". Their old log-probs are those of `split`.
        seconds: Wall time of each stage.
    """

    id_B: Tensor
    rollout: Rollout[Any]
    reconstructions_NCHW: Tensor
    rewards: Rewards
    advantage_BG: Tensor
    segments: dict[str, Segment[Any]]
    seconds: dict[str, float] = field(default_factory=dict)

    def select(self, images: Sequence[int]) -> Experience:
        """The experience of some of its images; whole groups, in the order given."""
        images, count = list(images), len(self.id_B)
        drawn = self.reconstructions_NCHW[rows_of(images, len(self.reconstructions_NCHW) // count)]
        parts = {name: part_BG[images] for name, part_BG in self.rewards.parts.items()}
        return replace(
            self,
            id_B=self.id_B[images],
            rollout=self.rollout.of(images, self.rollout.group),
            reconstructions_NCHW=drawn,
            rewards=Rewards(self.rewards.reward_BG[images], parts),
            advantage_BG=self.advantage_BG[images],
            segments={name: one.of(images, len(one.actions) // count) for name, one in self.segments.items()},
        )


@torch.no_grad()
def roll_out(
    umm: UMM, reward: WeightedReward, batch: ImageBatch, plan: Plan, step: int, references: Collection[str] = ()
) -> Experience:
    """Caption, reconstruct, reward, compare.

    Args:
        umm: Captioner, conditioner and renderer.
        reward: Scores reconstructions against their sources.
        batch: ``image`` [B, 3, H, W] and ``id`` [B].
        plan: Settings of the rollout, see `Plan`.
        step: Number of this rollout since the start of the run; part of every seed.
        references: Segments whose loss needs log-probs of the reference.
    """
    watch = Stopwatch()
    rollout, reconstructions_NCHW, trajectory = autoencode(umm, batch, plan, step, watch)
    with watch("reward"):
        texts = [text for text in rollout.texts for _ in range(plan.reconstructions)]
        rewards, advantage_BG, drawn_advantage_R = credit(reward(batch["image"], reconstructions_NCHW, texts), plan)

    def recorded(name: str, policy: Policy[A], actions: A, advantage_R: Tensor) -> Segment[A]:
        reference_RS = None
        if name in references:
            with watch("reference"), policy.learner.reference():
                reference_RS = replay(policy, actions, len(batch["id"]), plan.mini_batches)
        return Segment(policy, actions, advantage_R, reference_RS)

    segments: dict[str, Segment[Any]] = {}
    if plan.train != "images":
        segments["caption"] = recorded("caption", umm.captioner, rollout, advantage_BG.flatten())
    if umm.image_policy is not None and trajectory is not None:
        segments["image"] = recorded("image", umm.image_policy, trajectory, drawn_advantage_R)
    return Experience(batch["id"], rollout, reconstructions_NCHW, rewards, advantage_BG, segments, watch.seconds)


@torch.no_grad()
def autoencode(
    umm: UMM, batch: ImageBatch, plan: Plan, step: int, watch: Stopwatch | None = None
) -> tuple[Rollout[Any], Tensor, Actions | None]:
    """Images through text and back.

    Returns:
        The captions; their reconstructions ``[N*M, 3, H, W]``; and what the renderer did, if it trains, else None.
    """
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
        if plan.train == "captions" or umm.image_policy is None:
            first, row_of = distinct(_made_from(rollout, seeds, plan))
            if len(first) == len(seeds):
                return rollout, umm.renderer.render(condition, seeds), None
            return rollout, umm.renderer.render(condition.index(first), [seeds[row] for row in first])[row_of], None
        trajectory: Actions = umm.image_policy.sample(condition, seeds)
        return rollout, umm.image_policy.pixels(trajectory), trajectory


def _made_from(rollout: Rollout[Any], seeds: Sequence[int], plan: Plan) -> list[tuple[Any, ...]]:
    """What each reconstruction follows from: its image, the tokens of its caption, and its noise."""
    captions = [
        (n // rollout.group, *(token for token, mask in zip(tokens, masks, strict=True) if mask))
        for n, (tokens, masks) in enumerate(zip(rollout.tokens_NT.tolist(), rollout.mask_RS.tolist(), strict=True))
    ]
    return [(captions[row // plan.reconstructions], seed) for row, seed in enumerate(seeds)]


def distinct(keys: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """Places of the first of each kind, and for every key its kind's number in that list."""
    first: dict[Hashable, int] = {}
    for place, key in enumerate(keys):
        first.setdefault(key, place)
    number = {key: kind for kind, key in enumerate(first)}
    return list(first.values()), [number[key] for key in keys]


def credit(each: Rewards, plan: Plan) -> tuple[Rewards, Tensor, Tensor]:
    """Rewards of reconstructions to rewards and advantages of what made them.

    A caption is compared with the other captions of its image, by the mean over its reconstructions. A reconstruction is
    compared with the others of its caption; where there is one only, it shares its caption's advantage.

    Args:
        each: Rewards ``[B, G*M]`` of all reconstructions.
        plan: Settings of the rollout, see `Plan`.

    Returns:
        Rewards ``[B, G]`` of captions, advantages ``[B, G]`` of captions, and advantages ``[N*M]`` of reconstructions.
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


@torch.no_grad()
def split(experience: Experience, mini_batches: int, on_policy: Collection[int] = ()) -> list[dict[str, Segment[Any]]]:
    """What the loss reads of each mini-batch, with old log-probs, or without where its first pass has the weights of the rollout.

    The update compares its log-probs with a *replay* by the same code on the same mini-batch, so that the ratio is exactly one
    before the first optimizer step. A mini-batch whose first pass comes before that step needs no replay: its old log-probs
    are those of this pass, see `Segment.since_rollout`.

    Args:
        experience: One rollout. The time that the replay takes is added to its ``seconds``.
        mini_batches: Number of parts.
        on_policy: Numbers of the mini-batches whose first pass has the weights of the rollout.
    """
    count, watch, found = len(experience.id_B), Stopwatch(experience.seconds), []
    for number, images in enumerate(parts(count, mini_batches)):
        segments = experience.segments
        if mini_batches > 1:
            segments = {name: one.of(images, len(one.actions) // count) for name, one in segments.items()}
        if number not in on_policy:
            with watch("replay"):
                for segment in segments.values():
                    segment.since_rollout(segment.logprobs())
        found.append(segments)
    return found


def replay(policy: Policy[A], actions: A, images: int, mini_batches: int) -> Tensor:
    """Log-probs ``[R, S]`` under the policy's current weights, computed exactly as the update will."""
    per_image = len(actions) // images
    return torch.cat([policy.logprobs(actions.of(part, per_image)) for part in parts(images, mini_batches)])


def parts(images: int, mini_batches: int) -> list[range]:
    """Image numbers of each mini-batch: equal, contiguous, whole groups."""
    if images % mini_batches:
        raise ValueError(
            f"a rank's batch of {images} images cannot be split into model.init_args.mini_batches={mini_batches} equal parts; "
            "allowed: a divisor of data.init_args.batch_size (images per rank), and full batches only"
        )
    size = images // mini_batches
    return [range(start, start + size) for start in range(0, images, size)]


def caption_seeds(plan: Plan, ids: Sequence[int], step: int) -> list[int]:
    """One seed per caption (N): captions of one image differ."""
    return [seed_of(plan.seed, image, step, "caption", g) for image in ids for g in range(plan.group)]


def noise_seeds(plan: Plan, ids: Sequence[int], step: int) -> list[int]:
    """One seed per reconstruction (N*M) for the renderer; the m-th ones of a group are equal where the noise is shared.

    They never are where reconstructions of different captions are compared to train the renderer: a baseline that
    depends on an action's own noise would bias its gradient.
    """
    compared = plan.train != "captions" and plan.reconstructions == 1
    seeds = []
    for image in ids:
        for g in range(plan.group):
            own = () if plan.shared_noise and not compared else ("noise", g)
            numbers = [("reconstruction", m) if m else () for m in range(plan.reconstructions)]
            seeds += [seed_of(plan.seed, image, step, *own, *number) for number in numbers]
    return seeds
