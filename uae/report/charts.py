"""Which scalars of a run are looked at first, and together: the charts of TensorBoard's first screen and of the report."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Chart(NamedTuple):
    """Scalars in one picture.

    Args:
        title: What is seen, with its unit.
        tags: Regular expressions, each for whole tags.
    """

    title: str
    tags: tuple[str, ...]

    def found_in(self, tags: Iterable[str]) -> list[str]:
        """Those of some tags that belong into this chart."""
        return [tag for tag in tags if any(re.fullmatch(pattern, tag) for pattern in self.tags)]


DASHBOARD: Mapping[str, tuple[Chart, ...]] = {
    "Is it learning?": (
        Chart("Reward of the training captions, mean", ("reward/mean",)),
        Chart("Validation: reward and held-out score", ("val_reward/mean", "unified_score/held_out")),
        Chart("Validation: benchmarks", ("(understanding|generation)/overall",)),
        Chart("Loss of the cold start", ("(?!(image_)?policy/)[a-z_]+/([a-z_]+_)?loss",)),
    ),
    "Is it healthy?": (
        Chart("Entropy of the policy, nats per action", ("(image_)?policy/entropy",)),
        Chart("Groups whose rewards are all equal, share", ("reward/zero_variance",)),
        Chart("Rise of reward and held-out, in spreads", ("hacking/rise/(reward|held_out)",)),
        Chart("Actions with a clipped ratio, share", ("(image_)?policy/clip_fraction",)),
        Chart("Divergence from the start, nats per action", ("(image_)?policy/kl",)),
        Chart("Updates that were skipped, number", ("health/skipped_updates",)),
    ),
    "Where does the time go?": (
        Chart("Seconds per rollout, by stage", ("time/[a-z_]+",)),
        Chart("Caption tokens per second", ("speed/tokens_per_second",)),
        Chart("Reconstructions per second", ("speed/images_per_second",)),
    ),
    "What does it write?": (
        Chart("Tokens per caption, mean", ("caption/length",)),
        Chart("Captions that end by themselves, share", ("caption/finished",)),
    ),
}


def layout(tags: Iterable[str]) -> dict[str, dict[str, list[object]]]:
    """The dashboard as ``SummaryWriter.add_custom_scalars`` takes it, with those charts only for which there are scalars.

    A chart is the same for all runs that have it, because TensorBoard merges the layouts of runs by their content.
    """
    known = list(tags)
    shown = {question: [chart for chart in charts if chart.found_in(known)] for question, charts in DASHBOARD.items()}
    return {
        f"{number}. {question}": {chart.title: ["Multiline", [f"^{tag}$" for tag in chart.tags]] for chart in charts}
        for number, (question, charts) in enumerate(shown.items(), 1)
        if charts
    }
