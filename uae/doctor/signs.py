"""What the numbers of a run say. The limits are those of `callbacks.health.Health`, as the run was configured."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from statistics import fmean
from typing import Any

from callbacks.health import ADVICE, LR, Health, Sign
from uae.doctor.finding import Finding, note, ok, wrong
from uae.doctor.run_folder import Run

POLICIES = ("policy", "image_policy")
LAST = 10  # rollouts that a mean is taken of
FLAT = 1e-6  # a standard deviation of rewards below this is none
HALF = 0.5  # of groups without a signal, or of actions without a gradient: more than this is too many
FINISHED = 0.9  # share of captions that should end before the limit
TOKENS = "model.init_args.sampling.max_tokens"
HELD_OUT = "unified_score/held_out"


def check_numbers(run: Run) -> list[Finding]:
    """The findings about what a run has logged, those that are wrong first."""
    if not run.values("reward/mean"):
        return [note("nothing was logged about a rollout: the run ended before its first one, or trains without rewards")]
    signs = (finite, reward_spread, sampler_gap, limits, clipping, truncation, entropy, held_out, hacking)
    found = [finding for sign in signs for finding in sign(run)]
    return sorted(found, key=lambda finding: ("wrong", "note", "ok").index(finding.state)) or [ok("the numbers look healthy")]


def finite(run: Run) -> Iterator[Finding]:
    """Rewards and losses that are no numbers, and updates that were skipped for it."""
    for tag in ("reward/mean", *(f"{policy}/loss" for policy in POLICIES)):
        bad = [step for step, value in run.scalars.get(tag, ()) if not math.isfinite(value)]
        if bad:
            cure = "check model.init_args.reward" if tag.startswith("reward") else f"lower {LR}, or raise trainer.precision"
            yield wrong(f"{tag} is not finite at {len(bad)} of {len(run.values(tag))} steps, first at step {bad[0]}", cure)
    skipped = max(run.values("health/skipped_updates"), default=0)
    if skipped:
        yield wrong(f"health/skipped_updates={skipped:.0f}: updates that were not finite", f"lower {LR}; docs/health.md")


def reward_spread(run: Run) -> Iterator[Finding]:
    """Groups in which all captions have the same reward: nothing is learned from them."""
    spread, flat = _recent(run, "reward/std"), _recent(run, "reward/zero_variance")
    if spread is not None and spread < FLAT:
        text = f"reward/std={spread:.1g}: all captions of an image get the same reward, so the loss is 0"
        yield wrong(text, ADVICE["zero_variance"])
    elif flat is not None and flat >= HALF:
        yield wrong(f"reward/zero_variance={flat:.2f}: this share of the groups teaches nothing", ADVICE["zero_variance"])
    elif spread is not None:
        loss = fmean(map(abs, run.values("policy/loss")[-LAST:] or [0.0]))
        aside = f"; policy/loss near 0 ({loss:.0e}) is normal, as advantages of a group add up to 0" if loss < 0.01 else ""
        yield ok(f"reward/std={spread:.3f} within groups{aside}")


def sampler_gap(run: Run) -> Iterator[Finding]:
    """Log-probs of the sampler that are not those of training code."""
    allowed = run.setting("model.init_args.ratio_tolerance", math.inf)
    for policy in POLICIES:
        worst = max(run.values(f"{policy}/sampler_gap"), default=0.0)
        if worst > allowed:
            text = f"{policy}/sampler_gap={worst:.2g} is above model.init_args.ratio_tolerance={allowed:g}"
            yield wrong(text, f"{ADVICE['sampler_gap']}; configs/loss/correction.yaml weighs it")
        elif run.values(f"{policy}/sampler_gap"):
            yield ok(f"{policy}/sampler_gap={worst:.1g}: sampler and training code agree (allowed: {allowed:g})")


def limits(run: Run) -> Iterator[Finding]:
    """KL divergence and policy ratios above the limits of Health."""
    signs: tuple[tuple[Sign, str, str], ...] = (("kl", "kl", "max_kl"), ("ratio", "ratio_max", "max_ratio"))
    for policy in POLICIES:
        for sign, name, key in signs:
            tag, limit = f"{policy}/{name}", _limit(run, key)
            if limit is not None and (worst := _sustained(run.values(tag), _limit(run, "patience"))) > limit:
                yield wrong(f"{tag} stayed at {worst:.3g} or above; allowed: {key}={limit:g} of callbacks.health.Health", ADVICE[sign])


def clipping(run: Run) -> Iterator[Finding]:
    """Updates of which the clip range cuts off a large part."""
    for policy, loss in zip(POLICIES, ("loss", "image_loss"), strict=True):
        share = _recent(run, f"{policy}/clip_fraction")
        if share is not None and share > HALF:
            cure = f"lower {LR} or model.init_args.num_iterations, or widen model.init_args.{loss}.epsilon_high"
            yield wrong(f"{policy}/clip_fraction={share:.2f}: these actions have no gradient; allowed: up to {HALF:g}", cure)


def truncation(run: Run) -> Iterator[Finding]:
    """Captions that were cut off at the limit."""
    share = _recent(run, "caption/finished")
    if share is not None and share < FINISHED:
        limit = run.setting(TOKENS, "?")
        cure = f"raise {TOKENS}, or shorten captions by configs/reward/caption_penalties.yaml"
        yield wrong(f"caption/finished={share:.2f}: {1 - share:.0%} of the captions are cut off at {TOKENS}={limit}", cure)


def entropy(run: Run) -> Iterator[Finding]:
    """Captions that have become all the same."""
    values, patience, least = run.values("policy/entropy"), _limit(run, "patience"), _limit(run, "min_entropy")
    if least is None or len(values) < 2 * patience:
        return
    start, end = fmean(values[:patience]), max(values[-patience:])
    if end < least * start:
        text = f"policy/entropy fell from {start:.3g} to {end:.3g}; allowed: min_entropy={least:g} of the start's"
        yield wrong(text, ADVICE["entropy"])


def held_out(run: Run) -> Iterator[Finding]:
    """A held-out score that has not risen."""
    before, after = _ends(run, HELD_OUT)
    first, last = _ends(run, "val_reward/mean")
    if before is None or after is None:
        return
    if after > before:
        yield ok(f"{HELD_OUT} {before:.3f} -> {after:.3f}")
        return
    if first is not None and last is not None and last > first:
        reward = f", while val_reward/mean rose {first:.3f} -> {last:.3f}"
        yield wrong(f"{HELD_OUT} {before:.3f} -> {after:.3f} has not risen{reward}", f"{ADVICE['reward_hacking']}; docs/health.md")
        return
    cure = f"more trainer.max_steps, a higher {LR}, more model.init_args.group; see reward/std first"
    yield wrong(f"{HELD_OUT} {before:.3f} -> {after:.3f} has not risen, and neither has the reward", cure)


def hacking(run: Run) -> Iterator[Finding]:
    """Validations at which the reward was being cheated."""
    steps = [step for step, value in run.scalars.get("hacking/alarm", ()) if value]
    if steps:
        yield wrong(
            f"hacking/alarm at step {', '.join(map(str, steps))}: the reward rose and the held-out encoders did not follow",
            f"look at {run.folder / 'hacking.png'}; lower the weight of the part that rose most, or raise model.init_args.loss.beta",
        )


def _limit(run: Run, key: str) -> Any:
    """A limit of Health: the run's own, or the default."""
    default = inspect.signature(Health).parameters[key].default
    return run.arguments("callbacks.health.Health").get(key, default)


def _recent(run: Run, tag: str) -> float | None:
    """The mean of the last finite values of a tag; None if there are none."""
    values = [value for value in run.values(tag)[-LAST:] if math.isfinite(value)]
    return fmean(values) if values else None


def _sustained(values: list[float], patience: int) -> float:
    """The largest value that was reached or exceeded ``patience`` times in a row; in a shorter run, all the time."""
    width = min(patience, len(values))
    return max((min(values[start : start + width]) for start in range(len(values) - width + 1) if width), default=-math.inf)


def _ends(run: Run, tag: str) -> tuple[float | None, float | None]:
    """A metric of the first and the last validation; None where there was no such validation."""
    before, after = (run.summary.get(when, {}).get(tag) for when in ("before", "after"))
    values = run.values(tag)
    if before is None or after is None:
        return (values[0], values[-1]) if len(values) > 1 else (None, None)
    return before, after
