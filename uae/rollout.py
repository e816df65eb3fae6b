"""One rollout, as the paper draws it (arXiv 2509.09666): an auto-encoder whose latent is text.

    image --Captioner--> G captions --Conditioner--> condition --Renderer--> reconstructions --Reward--> r --> advantage

`autoencode` is the left part of the figure, up to the reconstructions; `roll_out` is all of it; `split` cuts it into the
mini-batches of the update, with the log-probs that the loss compares with. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, Literal

import torch
from torch import Tensor

from uae.groups import Credit, Drawn, Filtering, Order, credit, distinct, in_varied_groups, on_any_rank
from uae.grpo import Correction
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
    advantage_order: Order = "sum_then_normalize"
    filtering: Filtering = Filtering()
    instruction: str | None = None
    mini_batches: int = 1
    train: Train = "captions"
    reconstructions: int = 1

    def __post_init__(self) -> None:
        """Refuse two ways to scale an advantage."""
        if self.advantage_order == "normalize_then_sum" and self.advantage_scale != "group":
            raise ValueError(
                f"model.init_args.advantage_scale={self.advantage_scale} with model.init_args.advantage_order=normalize_then_sum, "
                "which divides every part by its std within the group and the sum by the std of the batch; allowed: group"
            )


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
        kept_R: Whether the loss counts a row; None if it counts all, see `uae.groups.Filtering`.
    """

    policy: Policy[A]
    actions: A
    advantage_R: Tensor
    reference_logp_RS: Tensor | None = None
    old_logp_RS: Tensor | None = None
    kept_R: Tensor | None = None

    @property
    def mask_RS(self) -> Tensor:  # noqa: N802 (a shape)
        """1 where the loss counts an action, else 0."""
        return self.actions.mask_RS if self.kept_R is None else self.actions.mask_RS * self.kept_R[:, None]

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

    def weights(self, correction: Correction | None) -> Tensor | None:
        """Importance weights ``[R, S]`` for the sampler's gap, from the old log-probs; None if nothing is corrected."""
        if correction is None:
            return None
        assert self.old_logp_RS is not None, "`since_rollout` has set them"
        return correction(self.actions.logp_RS, self.old_logp_RS, self.mask_RS)

    def of(self, images: Sequence[int], per_image: int) -> Segment[A]:
        """The segment of some images, each with ``per_image`` rows."""
        rows = rows_of(images, per_image)
        return replace(
            self,
            actions=self.actions.of(images, per_image),
            advantage_R=self.advantage_R[rows],
            reference_logp_RS=None if self.reference_logp_RS is None else self.reference_logp_RS[rows],
            old_logp_RS=None if self.old_logp_RS is None else self.old_logp_RS[rows],
            kept_R=None if self.kept_R is None else self.kept_R[rows],
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
        redrawn: Share of the images that were drawn again, see `uae.groups.Filtering`.
    """

    id_B: Tensor
    rollout: Rollout[Any]
    reconstructions_NCHW: Tensor
    rewards: Rewards
    advantage_BG: Tensor
    segments: dict[str, Segment[Any]]
    seconds: dict[str, float] = field(default_factory=dict)
    redrawn: float = 0.0

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
            rewards=Rewards(self.rewards.reward_BG[images], parts, self.rewards.weights),
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
    drawn, worth, redrawn = draw_until_varied(umm, reward, batch, plan, step, watch)

    def recorded(name: str, policy: Policy[A], actions: A, advantage_R: Tensor, compared: int) -> Segment[A]:
        reference_RS = None
        if name in references:
            with watch("reference"), policy.learner.reference():
                reference_RS = replay(policy, actions, len(batch["id"]), plan.mini_batches)
        return Segment(policy, actions, advantage_R, reference_RS, kept_R=kept(actions, advantage_R, compared, plan))

    segments: dict[str, Segment[Any]] = {}
    if plan.train != "images":
        segments["caption"] = recorded("caption", umm.captioner, drawn.rollout, worth.advantage_BG.flatten(), plan.group)
    if umm.image_policy is not None and drawn.trajectory is not None:
        compared = plan.reconstructions if plan.reconstructions > 1 else plan.group
        segments["image"] = recorded("image", umm.image_policy, drawn.trajectory, worth.drawn_advantage_R, compared)
    return Experience(
        batch["id"], drawn.rollout, drawn.reconstructions_NCHW, worth.rewards, worth.advantage_BG, segments, watch.seconds, redrawn
    )


def draw_until_varied(
    umm: UMM, reward: WeightedReward, batch: ImageBatch, plan: Plan, step: int, watch: Stopwatch
) -> tuple[Drawn, Credit, float]:
    """Draw every image, and images without any advantage again, up to ``plan.filtering.rounds`` times.

    Returns:
        What was drawn, what it is worth, and the share of the images that were drawn more than once.
    """

    def encode(rollout: Rollout[Any]) -> Any:
        return _repeated(umm.conditioner.encode(rollout.texts, rollout), plan)

    valued = partial(credit, reconstructions=plan.reconstructions, scale=plan.advantage_scale, order=plan.advantage_order)
    again = set[int]()
    drawn = draw(umm, reward, batch, plan, step, watch)
    worth = valued(drawn.each)
    for attempt in range(1, plan.filtering.rounds + 1):
        flat = worth.flat(plan.train).nonzero().flatten().tolist()
        if not on_any_rank(bool(flat), batch["id"].device):
            break
        if flat:
            some: ImageBatch = {"image": batch["image"][flat], "id": batch["id"][flat]}
            other = replace(plan, seed=seed_of(plan.seed, "attempt", attempt))
            drawn = drawn.with_images(flat, draw(umm, reward, some, other, step, watch), encode)
            again |= set(flat)
        worth = valued(drawn.each)
    return drawn, worth, len(again) / len(batch["id"])


def draw(umm: UMM, reward: WeightedReward, batch: ImageBatch, plan: Plan, step: int, watch: Stopwatch) -> Drawn:
    """Caption, reconstruct and reward the images of a batch once."""
    rollout, reconstructions_NCHW, trajectory = autoencode(umm, batch, plan, step, watch)
    with watch("reward"):
        texts = [text for text in rollout.texts for _ in range(plan.reconstructions)]
        return Drawn(rollout, reconstructions_NCHW, trajectory, reward(batch["image"], reconstructions_NCHW, texts))


def kept(actions: Actions, advantage_R: Tensor, compared: int, plan: Plan) -> Tensor | None:
    """Which rows the loss counts, bool ``[R]``; None if nothing is ever left out. ``compared`` is the size of the rows' groups."""
    if not plan.filtering.drops:
        return None
    kept_R = torch.ones_like(advantage_R, dtype=torch.bool)
    if plan.filtering.drop_flat_groups:
        kept_R &= in_varied_groups(advantage_R, compared)
    if plan.filtering.drop_truncated and isinstance(actions, Rollout):
        kept_R &= actions.mask_RS.sum(1) < plan.sampling.max_tokens
    return kept_R


@torch.no_grad()
def autoencode(
    umm: UMM, batch: ImageBatch, plan: Plan, step: int, watch: Stopwatch | None = None
) -> tuple[Rollout[Any], Tensor, Actions | None]:
    """Images through text and back.

    Returns:
        The captions; their reconstructions ``[N*M, 3, H, W]``; and what the renderer did, if it trains, else None.
    """
    if "image" not in batch or "id" not in batch:
        raise ValueError(f"a batch has {sorted(batch)}, but needs image and id: use a data module of uae.data or add them")
    watch = watch or Stopwatch()
    ids = batch["id"].tolist()
    with watch("caption"):
        context = umm.captioner.prepare(batch["image"], plan.instruction)
        rollout = umm.captioner.sample(context, plan.group, plan.sampling, caption_seeds(plan, ids, step))
    with watch("condition"):
        condition = umm.conditioner.encode(rollout.texts, rollout)
    with watch("render"):
        condition = _repeated(condition, plan)
        seeds = noise_seeds(plan, ids, step)
        if plan.train == "captions" or umm.image_policy is None:
            first, row_of = distinct(_made_from(rollout, seeds, plan))
            if len(first) == len(seeds):
                return rollout, umm.renderer.render(condition, seeds), None
            return rollout, umm.renderer.render(condition.index(first), [seeds[row] for row in first])[row_of], None
        trajectory: Actions = umm.image_policy.sample(condition, seeds)
        return rollout, umm.image_policy.pixels(trajectory), trajectory


def _repeated(condition: Any, plan: Plan) -> Any:
    """One row for every reconstruction, from one for every caption."""
    if plan.reconstructions == 1:
        return condition
    return condition.index([n for n in range(len(condition)) for _ in range(plan.reconstructions)])


def _made_from(rollout: Rollout[Any], seeds: Sequence[int], plan: Plan) -> list[tuple[Any, ...]]:
    """What each reconstruction follows from: its image, the tokens of its caption, and its noise."""
    captions = [
        (n // rollout.group, *(token for token, mask in zip(tokens, masks, strict=True) if mask))
        for n, (tokens, masks) in enumerate(zip(rollout.tokens_NT.tolist(), rollout.mask_RS.tolist(), strict=True))
    ]
    return [(captions[row // plan.reconstructions], seed) for row, seed in enumerate(seeds)]


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
