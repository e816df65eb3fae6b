"""Watches whether the reward is being cheated: rises in it that encoders which no reward uses do not see."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL import Image
from torch import Tensor

from uae.evaluation import AutoEncoder
from uae.files.examples import small
from uae.files.tiles import Tile, grid, wrapped
from uae.loggers.showing import show_picture
from uae.metrics import agreement
from uae.metrics.agreement import Change
from uae.trainer import is_dry_run

KEPT = 256  # images of every process whose pictures are kept until the end of a validation
NAMED = 3  # examples in an alarm
HELD_OUT, REWARD = "held_out", "reward"


class Row(NamedTuple):
    """One image in one validation."""

    name: str
    caption: str
    pictured: bool  # whether its pictures are kept
    scores: dict[str, float]


@dataclass
class Validation:
    """What every image scored in one validation, ordered by id; images without a finite score are left out.

    Args:
        step: Optimizer steps before it.
        ids: The N ids.
        scores: Numbers float64 ``[N]``: under "reward", "reward/<part>" and "held_out".
        names, captions, pictured: Of the N images; a validation that comes from a checkpoint has none.
    """

    step: int
    ids: list[int]
    scores: dict[str, np.ndarray]
    names: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    pictured: list[bool] = field(default_factory=list)

    @classmethod
    def of_rows(cls, step: int, rows: Mapping[int, Row]) -> Validation:
        """From the images by id."""
        kept = {one: rows[one] for one in sorted(rows) if math.isfinite(rows[one].scores[REWARD] + rows[one].scores[HELD_OUT])}
        tags = next(iter(kept.values())).scores if kept else ()
        scores = {tag: np.array([row.scores[tag] for row in kept.values()]) for tag in tags}
        names, captions, pictured = ([getattr(row, name) for row in kept.values()] for name in ("name", "caption", "pictured"))
        return cls(step, list(kept), scores, names, captions, pictured)

    def state(self) -> dict[str, Any]:
        """What later validations are compared with, in plain Python and tensors."""
        return {"step": self.step, "ids": self.ids, "scores": {tag: torch.from_numpy(row_N) for tag, row_N in self.scores.items()}}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Validation:
        """The reverse of `state`."""
        return cls(state["step"], state["ids"], {tag: row_N.numpy() for tag, row_N in state["scores"].items()})

    def matched(self, other: Validation) -> tuple[list[int], list[int]]:
        """The rows, here and in another validation, of the images that both have."""
        rows = {one: row for row, one in enumerate(other.ids)}
        here = [row for row, one in enumerate(self.ids) if one in rows]
        return here, [rows[self.ids[row]] for row in here]


class RewardHacking(Callback):
    """Compares the reward of every validation image with its held-out score, and warns when only the reward has risen.

    The *held-out score* of an image is the mean cosine under the encoders of ``model.init_args.unified_score.init_args.held_out``.
    At every validation this logs

    * ``hacking/rank_correlation/reward`` and ``hacking/rank_correlation/<part>``: Spearman's rank correlation of the reward, and
      of every part of it, with the held-out score, over the images; 0 for a part that is the same for all;
    * ``hacking/rise/reward`` and ``hacking/rise/held_out``: the mean rise since the first validation of the run, in *spreads*
      (standard deviations over the images of that validation);
    * ``hacking/improvement_correlation``: the rank correlation of both rises over the images, 0 at the first validation;
    * ``hacking/alarm``: whether the rule below holds, 1 or 0;

    and draws the images whose reward ranks highest above their held-out score, as ``hacking/disagreement`` in the logger and
    as ``hacking.png``, of the last validation, in the log directory. Pictures of the first 256 images of every process can be
    drawn; the numbers are of all images. An image counts once, however often it comes, on whatever process.

    **The alarm** is a warning that names examples and a key to change, once whenever the rule begins to hold. It holds if the
    reward has risen by more than 0.25 spreads since the first validation, and the held-out score by less than a quarter of the
    reward's rise; or if, since the validation with the best held-out score so far, the reward has risen, and the held-out score
    has fallen by more than 0.1 spreads. Each inequality has to hold by three standard errors of the mean over images. If it is
    an equality, it does so by chance in 1 of 741 validations of many images. Measured on the miniature, with 128 images: no
    alarm in 34 validations of rewards that are not cheated, and an alarm within 100 steps in all five runs of three that are
    (docs/health.md).

    Checkpoints contain the first and the best validation, so a resumed run compares with the original ones.

    Args:
        images: Number of images to draw.

    Raises:
        ValueError: ``images`` is below 1.
    """

    def __init__(self, images: int = 6) -> None:
        if images < 1:
            raise ValueError(f"images={images} of callbacks.hacking.RewardHacking; allowed: 1 or more")
        self.images = images
        self.first: Validation | None = None
        self.best: Validation | None = None  # by its held-out score
        self.alarmed = False
        self._rows: dict[int, Row] = {}  # of this process, by id
        self._pictures: dict[int, tuple[Tensor, Tensor]] = {}  # of this process: source, reconstruction
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for the log directory while all ranks are here, and say so where nothing can be compared."""
        self._folder = Path(trainer.log_dir) if trainer.log_dir and not is_dry_run(trainer) else None
        if stage != "fit" or not isinstance(pl_module, AutoEncoder):  # a cold start has no reward that could be cheated
            return
        if pl_module.unified_score is None or not pl_module.unified_score.held_out:
            rank_zero_warn(
                "callbacks.hacking.RewardHacking does nothing: there are no held-out encoders; name some that no reward uses in "
                "model.init_args.unified_score.init_args.held_out"
            )

    def state_dict(self) -> dict[str, Any]:
        """The first and the best validation, for checkpoints."""
        kept = {"first": self.first, "best": self.best}
        return {"alarmed": self.alarmed, **{name: one.state() for name, one in kept.items() if one is not None}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what a resumed run compares with."""
        self.alarmed = state_dict["alarmed"]
        self.first, self.best = (Validation.of(state_dict[name]) if name in state_dict else None for name in ("first", "best"))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the images of the validation before."""
        self._rows, self._pictures = {}, {}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep what the images of this process scored, and some of their pictures."""
        if not isinstance(outputs, dict) or HELD_OUT not in outputs:
            return
        tags = [tag for tag in outputs if tag in (HELD_OUT, REWARD) or tag.startswith(f"{REWARD}/")]
        table_BK = torch.stack([outputs[tag].float() for tag in tags], 1).tolist()
        ids = outputs["id"].tolist()
        names = batch.get("name") or [f"image {one}" for one in ids]
        for row, one in enumerate(ids):
            if len(self._pictures) < KEPT:
                self._pictures[one] = small(outputs["image"][row]), small(outputs["reconstruction"][row])
            scores = dict(zip(tags, table_BK[row], strict=True))
            self._rows[one] = Row(names[row], outputs["caption"][row], one in self._pictures, scores)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare, log, draw and warn. Collective: all ranks get all numbers, and the pictures that are drawn."""
        parts = _gathered(self._rows)
        now = Validation.of_rows(trainer.global_step, {one: row for part in reversed(parts) for one, row in part.items()})
        if not now.ids:
            return
        self.first, self.best = _earlier(self.first, now), _earlier(self.best, now)
        tags = {tag.removeprefix(f"{REWARD}/"): tag for tag in now.scores if tag != HELD_OUT}
        logged = {
            f"rank_correlation/{name}": agreement.rank_correlation(now.scores[tag], now.scores[HELD_OUT]) for name, tag in tags.items()
        }
        since_first, since_best = (_change(self.first, earlier, now) for earlier in (self.first, self.best))
        logged |= {"rise/reward": float(since_first.reward_N.mean()), "rise/held_out": float(since_first.held_out_N.mean())}
        logged["improvement_correlation"] = since_first.correlation
        since, earlier = (since_best, self.best) if since_best.turned else (since_first, self.first)
        alarmed = since_best.turned or since_first.left_behind
        pl_module.log_dict({f"hacking/{name}": value for name, value in {**logged, "alarm": float(alarmed)}.items()})
        worst = _worst(now)[: self.images]
        self._show(trainer, now, worst)
        if alarmed and not self.alarmed:
            reward: Any = pl_module.reward
            rank_zero_warn(
                f"step {now.step}: {_told(earlier.step, since)}; look at hacking.png: {_examples(now, worst)}; lower "
                f"{_key(reward.weights, earlier, now)} or reward more encoders there, raise model.init_args.loss.beta, or go back to "
                f"step {self.best.step}, which has the best held-out score"
            )
        self.alarmed = alarmed
        if now.scores[HELD_OUT].mean() > self.best.scores[HELD_OUT].mean():
            self.best = now

    def _show(self, trainer: Trainer, now: Validation, worst: list[int]) -> None:
        """Draw some images, whose pictures are gathered from the processes that have them."""
        wanted = [now.ids[row] for row in worst]
        parts = _gathered({one: self._pictures[one] for one in wanted if one in self._pictures})
        if not trainer.is_global_zero:
            return
        picture = panel(now, worst, {one: pair for part in parts for one, pair in part.items()})
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            picture.save(self._folder / "hacking.png")
        show_picture(trainer.loggers, "hacking/disagreement", picture, trainer.global_step)


def panel(now: Validation, rows: Sequence[int], pictures: Mapping[int, tuple[Tensor, Tensor]]) -> Image.Image:
    """A row per image: the source above its name, and the reconstruction above both numbers, their ranks, and the caption.

    A rank is the share of the images that score less.
    """
    below = {tag: agreement.shares_below(now.scores[tag]) for tag in (REWARD, HELD_OUT)}
    tiles: list[list[Tile]] = []
    for row in rows:
        source, reconstruction = pictures[now.ids[row]]
        numbers = [f"{tag.replace('_', ' ')} {now.scores[tag][row]:.3f}  rank {below[tag][row]:.0%}" for tag in (REWARD, HELD_OUT)]
        drawn = (reconstruction / 255, [*numbers, *wrapped(now.captions[row])])
        tiles.append([(source / 255, wrapped(now.names[row])), drawn])
    return grid(tiles)


def _worst(now: Validation) -> list[int]:
    """Rows of the images with pictures, the largest lead of the reward's rank over the held-out score's first."""
    lead_N = agreement.shares_below(now.scores[REWARD]) - agreement.shares_below(now.scores[HELD_OUT])
    return [int(row) for row in np.argsort(-lead_N, kind="stable") if now.pictured[row]]


def _examples(now: Validation, worst: Sequence[int]) -> str:
    named = [f"{now.names[row]} ({textwrap.shorten(now.captions[row], 100)!r})" for row in worst[:NAMED]]
    return ", ".join(named)


def _key(weights: Mapping[str, float], earlier: Validation, now: Validation) -> str:
    """The key to change: the weight of the part that added most to the rise of the reward."""
    here, there = now.matched(earlier)
    added = {
        part: weight * float(np.mean(now.scores[tag][here] - earlier.scores[tag][there]))
        for part, weight in weights.items()
        if weight and (tag := f"{REWARD}/{part}") in earlier.scores  # a resumed run may have another reward
    }
    key = "model.init_args.reward"
    return f"{key}.init_args.weights.{max(added, key=lambda part: added[part])}, where it rose most," if added else key


def _earlier(one: Validation | None, now: Validation) -> Validation:
    """What to compare with: a run that is resumed with other images begins anew."""
    return now if one is None or not now.matched(one)[0] else one


def _change(first: Validation, before: Validation, after: Validation) -> Change:
    """From one validation to another, over the images of both, in the spreads of the first validation."""
    here, there = after.matched(before)
    reward_N, held_out_N = (
        (after.scores[tag][here] - before.scores[tag][there]) / agreement.spread(first.scores[tag]) for tag in (REWARD, HELD_OUT)
    )
    return Change(reward_N, held_out_N)


def _told(step: int, since: Change) -> str:
    return (
        f"the reward is being gamed: since step {step} it rose by {since.reward_N.mean():.2f} spreads, but the held-out score by "
        f"{since.held_out_N.mean():.2f} (mean of {len(since.reward_N)} images; rank correlation of both rises {since.correlation:.2f})"
    )


def _gathered(own: dict[int, Any]) -> list[dict[int, Any]]:
    """What every process has. All have to call this."""
    if not torch.distributed.is_initialized():
        return [own]
    parts: list[dict[int, Any]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, own)
    return parts
