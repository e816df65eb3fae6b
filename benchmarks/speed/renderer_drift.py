"""What the renderer's switches save, and how far they change the ranks of captions in their groups.

    python -m benchmarks.speed.renderer_drift

The miniature as it was cold-started captions scenes of the test split at temperature 1, and draws the captions of a scene from equal
noise, as rollouts do. The reward is the similarity under its CLIP. For each switch: the mean of Kendall's tau-b over groups, between
the rewards of the exact renderer and those of the switch with the same noise; and the rows that the denoiser computes, as a share of
those of the plain pipeline. Rewards of the exact renderer under other noise say how much ranks depend on the noise alone.

Writes ``benchmarks/results/renderer_drift.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.stats import kendalltau
from torch import Tensor

from benchmarks.results import write
from uae.miniature.scenes import render, scene_of
from uae.miniature.tiny import Tiny, TinyCLIP
from uae.rewards import EncoderSimilarity
from uae.rollout import Plan, caption_seeds, noise_seeds
from uae.types import Sampling

STEPS, GUIDANCE = 10, 2.0
SWITCHES: dict[str, dict[str, Any]] = {
    "guidance_interval: [0.0, 0.8]": {"guidance_interval": (0.0, 0.8)},
    "guidance_interval: [0.0, 0.5]": {"guidance_interval": (0.0, 0.5)},
    "guidance_interval: [0.2, 1.0]": {"guidance_interval": (0.2, 1.0)},
    "guidance_interval: [0.2, 0.8]": {"guidance_interval": (0.2, 0.8)},
    "guidance_interval: [0.5, 1.0]": {"guidance_interval": (0.5, 1.0)},
    "guidance: 1.0": {"guidance": 1.0},
    "steps: 8": {"steps": 8},
    "steps: 6": {"steps": 6},
    "steps: 4": {"steps": 4},
    "steps: 2": {"steps": 2},
    "steps: 4, guidance: 1.0": {"steps": 4, "guidance": 1.0},
}


@dataclass
class Drawn:
    """Rewards ``[B, G]``, and how many rows the denoiser computed for them."""

    reward_BG: Tensor
    rows: int


@contextmanager
def counted(denoiser: Any) -> Iterator[list[int]]:
    """Inside, the list grows by the rows of every call that the denoiser computes."""
    forward, rows = denoiser.forward, []

    def count(*arguments: Any, **named: Any) -> Any:
        rows.append(len(named["hidden_states"]))
        return forward(*arguments, **named)

    denoiser.forward = count
    try:
        yield rows
    finally:
        del denoiser.forward


class Bench:
    """Captions of some scenes, which are drawn and rewarded again and again."""

    def __init__(self, scenes: int, group: int) -> None:
        self.umm, self.reward = Tiny(steps=STEPS, guidance=GUIDANCE).build(), EncoderSimilarity(TinyCLIP()).load()
        self.renderer: Any = self.umm.renderer
        self.exact = self.renderer.rendering
        self.plan, self.ids = Plan(group, Sampling(1.0, 32)), list(range(scenes))
        self.images_BCHW = render([scene_of(number, "test") for number in self.ids])
        context, seeds = self.umm.captioner.prepare(self.images_BCHW), caption_seeds(self.plan, self.ids, 0)
        self.rollout = self.umm.captioner.sample(context, group, self.plan.sampling, seeds)
        self.condition = self.umm.conditioner.encode(self.rollout.texts, self.rollout)

    def draw(self, noise: int = 0, **changes: Any) -> Drawn:
        """Draw all captions with changed settings of the renderer."""
        self.renderer.rendering = replace(self.exact, **changes)
        with counted(self.renderer.pipe.transformer) as rows:
            images_NCHW = self.renderer.render(self.condition, noise_seeds(self.plan, self.ids, noise))
        return Drawn(self.reward(self.images_BCHW, images_NCHW, self.rollout.texts), sum(rows))


def agreement(one_BG: Tensor, other_BG: Tensor) -> list[float]:
    """Kendall's tau-b of each group, but for groups in which all rewards of one side are equal."""
    taus = [float(kendalltau(one, other).statistic) for one, other in zip(one_BG.tolist(), other_BG.tolist(), strict=True)]
    return [tau for tau in taus if tau == tau]


def row(name: str, drawn: Drawn, taus: list[float], plain: int) -> dict[str, Any]:
    """A row of the table; the interval is that of the mean over groups, by the normal distribution."""
    half = 1.96 * statistics.stdev(taus) / len(taus) ** 0.5
    found = {"switch": name, "tau": statistics.mean(taus), "half": half, "groups": len(taus), "rows": drawn.rows}
    found["cost"] = drawn.rows / plain
    print(found, flush=True)
    return found | {"taus": taus}


def measure(scenes: int, group: int, noises: int) -> dict[str, Any]:
    """All rows. The floor takes several draws of other noise."""
    bench = Bench(scenes, group)
    exact, plain = bench.draw(), 2 * STEPS * scenes * group
    others = [bench.draw(noise) for noise in range(1, noises + 1)]
    of_noises = [agreement(exact.reward_BG, one.reward_BG) for one in others]
    floor = [statistics.mean(of_group) for of_group in zip(*of_noises, strict=True)]
    found = [row("exact, again", exact, agreement(exact.reward_BG, bench.draw().reward_BG), plain)]
    for name, changes in SWITCHES.items():
        drawn = bench.draw(**changes)
        found.append(row(name, drawn, agreement(exact.reward_BG, drawn.reward_BG), plain))
    found.append(row("exact, other noise", others[0], floor, plain))
    distinct = sum(len(set(bench.rollout.texts[start : start + group])) for start in range(0, scenes * group, group))
    return {
        "scenes": scenes, "group": group, "noises": noises, "steps": STEPS, "guidance": GUIDANCE, "plain_rows": plain,
        "distinct_captions_per_group": distinct / scenes, "rows": found,
    }  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# How far the renderer's switches change the ranks of captions",
        "",
        f"`python -m benchmarks.speed.renderer_drift`: {report['scenes']} scenes of the test split, {report['group']} captions each "
        f"(on average {report['distinct_captions_per_group']:.1f} different ones) at temperature 1, drawn by the cold-started "
        f"miniature. Exact is {report['steps']} steps with guidance {report['guidance']}. Tau: mean over groups of Kendall's tau-b "
        "with the exact renderer's rewards (its CLIP), same noise, with 95 % intervals of the mean; other noise: mean of "
        f"{report['noises']} draws. Rows: rows that the denoiser computed, as a share of those of the plain pipeline.",
        "",
        "| key below `rendering` | tau | rows |",
        "|---|---|---|",
    ]
    named = {"exact, again": "(exact, drawn again)", "exact, other noise": "(exact, other noise)"}
    for one in report["rows"]:
        switch = named.get(one["switch"], f"`{one['switch']}`")
        lines.append(f"| {switch} | {one['tau']:.2f} ± {one['half']:.2f} | {100 * one['cost']:.1f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--group", type=int, default=8, help="captions per scene")
    parser.add_argument("--noises", type=int, default=4, help="draws of other noise")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        found = measure(options.scenes, options.group, options.noises)
    write("renderer_drift", found, markdown(found))
