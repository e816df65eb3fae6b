"""Draws docs/pictures/architecture.png: the figure of the paper with one real rollout of the miniature in it.

python benchmarks/architecture_figure.py
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from uae.miniature.data import SceneSource
from uae.miniature.tiny import Tiny, TinyCLIP
from uae.models.finetune import LoRA
from uae.policies import prepare
from uae.rewards import EncoderSimilarity, WeightedReward
from uae.rollout import Experience, Plan, roll_out
from uae.types import ImageBatch, Sampling

FIGURE = Path(__file__).parents[1] / "docs/pictures/architecture.png"
GROUP = 4


def rollout_of_one_scene(number: int = 11) -> tuple[ImageBatch, Experience]:
    """One image of the test split, captioned and drawn four times by the miniature as it ships."""
    umm = prepare(Tiny().build(), "captions", (), LoRA(), None)
    reward = WeightedReward({"clip": EncoderSimilarity(TinyCLIP())}, {"clip": 1.0})
    reward.load()
    batch, _ = SceneSource("test", 100, seed=0, counts=(3,)).__getitems__([number])
    return batch, roll_out(umm, reward, batch, Plan(GROUP, Sampling(1.0, 32)), step=0)


def main() -> None:
    """Draw the figure."""
    batch, experience = rollout_of_one_scene()
    figure = plt.figure(figsize=(13, 5.2))
    figure.suptitle("image  →  Captioner  →  G captions  →  Conditioner, Renderer  →  G reconstructions  →  Reward", y=0.98)
    grid = figure.add_gridspec(GROUP, 5, width_ratios=(1.6, 3.2, 1.0, 1.1, 1.5), wspace=0.15, hspace=0.25)
    picture(figure.add_subplot(grid[1:3, 0]), batch["image"][0], "image x")
    for g in range(GROUP):
        words = textwrap.fill(experience.rollout.texts[g], 44)
        label(figure.add_subplot(grid[g, 1]), words, "caption y" if g == 0 else "", family="serif")
        drawn = figure.add_subplot(grid[g, 2])
        picture(drawn, experience.reconstructions_NCHW[g], "reconstruction x~" if g == 0 else "")
        label(figure.add_subplot(grid[g, 3]), f"{experience.rewards.reward_BG[0, g]:.3f}", "reward r" if g == 0 else "")
        axis = figure.add_subplot(grid[g, 4])
        advantage = experience.advantage_BG[0, g].item()
        axis.barh([0], [advantage], color="tab:green" if advantage > 0 else "tab:red")
        axis.set_xlim(-2, 2)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks([])
        axis.set_xticks([] if g + 1 < GROUP else [-2, 0, 2])
        axis.set_title("advantage A" if g == 0 else "", fontsize=10)
    below = "The loss makes captions likelier whose reward is above the mean of their group."
    figure.text(0.5, 0.01, below, ha="center")
    figure.savefig(FIGURE, dpi=80, bbox_inches="tight")
    print(FIGURE.relative_to(Path.cwd()) if FIGURE.is_relative_to(Path.cwd()) else FIGURE)


def picture(axis: Axes, image_3HW: torch.Tensor, title: str) -> None:
    """An image without axes."""
    axis.imshow(image_3HW.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    axis.set_title(title, fontsize=10)
    axis.axis("off")


def label(axis: Axes, text: str, title: str, **font: str) -> None:
    """Text in a box without axes."""
    axis.text(0.5, 0.5, text, ha="center", va="center", fontsize=10, **font)
    axis.set_title(title, fontsize=10)
    axis.axis("off")


if __name__ == "__main__":
    main()
