"""How good a miniature is before any reward: its decoder on true captions, its captioner, and what an error costs the reward.

    python benchmarks/gate.py tiny
    python benchmarks/gate.py janus

Results go to benchmarks/results/gate_<family>.json and .md.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from measuring import SYSTEMS, Scores, caption, draw, generation, reconstruction, scenes_of_test, trained, understanding
from results import write

from uae.encoders import similarity
from uae.miniature.metrics.scenes import agreement, shows
from uae.miniature.pretraining.contrastive import edit
from uae.miniature.scenes import TERSE, Detail, Scene, describe, detect, parse, render
from uae.miniature.tiny import TinyCLIP
from uae.types import UMM


def ladder(scenes: list[Scene]) -> dict[str, list[str]]:
    """Captions of the scenes with one thing wrong or missing, by what it is."""
    rng = random.Random(0)
    words = [describe(scene).split() for scene in scenes]
    edited = {
        f"wrong {attribute}": [describe(edit(scene, rng, attribute)) for scene in scenes]
        for attribute in ("color", "shape", "size", "place", "background")
    }
    return {
        "detailed": [describe(scene) for scene in scenes],
        **edited,
        "no background": [describe(scene, Detail(background=False)) for scene in scenes],
        "no sizes": [describe(scene, Detail(size=False)) for scene in scenes],
        "no positions": [describe(scene, Detail(position=False)) for scene in scenes],
        "tiny omitted": [describe(scene, Detail(omit_tiny=1.0), rng) for scene in scenes],
        "terse": [describe(scene, TERSE, rng) for scene in scenes],
        "words shuffled": [" ".join(rng.sample(said, len(said))) for said in words],
        "other scene": [describe(scene) for scene in scenes[1:] + scenes[:1]],
        "empty": [""] * len(scenes),
    }


def variation(umm: UMM, text: str = "a red square") -> dict[str, int]:
    """How many values each unsaid attribute takes over 64 noises, and in how many images what was said is there."""
    seen, said = detect(draw(umm, [text] * 64, list(range(64)))), parse(text)
    assert said is not None
    claim = said.objects[0]
    found = [o for scene in seen for o in scene.objects if (o.color, o.shape) == (claim.color, claim.shape)]
    counts = {name: len({getattr(o, name) for o in found}) for name in ("size", "row", "column")}
    strict = sum(shows(scene, said) for scene in seen)
    return {**counts, "background": len({scene.background for scene in seen}), "said object drawn": len(found), "strictly": strict}


def gate(family: str, count: int) -> None:
    """Measure, print and write."""
    umm, scenes, encoder = trained(family), scenes_of_test(count), TinyCLIP().load("cpu")
    sources = encoder.embed(render(scenes))
    closeness: dict[str, torch.Tensor] = {}
    exact: Scores = {}
    for name, texts in ladder(scenes).items():
        images = draw(umm, texts, list(range(count)))
        closeness[name] = similarity(encoder.embed(images), sources)
        exact = exact or agreement(detect(images), scenes)  # of the first, which is right in everything
    table = ["| caption | reward | cost |", "|---|---|---|"]
    for name, values in closeness.items():
        table.append(f"| {name} | {values.mean():.3f} | {(closeness['detailed'] - values).mean():+.3f} |")
    report: dict[str, Any] = {
        f"detailed true captions of {count} scenes, by the exact detector": exact,
        "one terse caption under 64 noises, distinct values of what it does not say": variation(umm),
        "mini-GenEval, strict, 64 prompts per task": generation(umm, 64),
        "captions, sampled": reconstruction(umm, scenes, caption(umm, scenes, 1.0)),
        "captions, greedy": reconstruction(umm, scenes, caption(umm, scenes, 0.0)),
        "mini-MMT, 200 questions per subtask": understanding(umm, 200),
    }
    for title, numbers in report.items():
        table.append(f"\n{title}: " + ", ".join(f"{name} {value:.3g}" for name, value in numbers.items()) + ".")
    print("\n".join(table))
    write(f"gate_{family}", {**report, "reward": {name: float(v.mean()) for name, v in closeness.items()}}, "\n".join(table))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(SYSTEMS))
    parser.add_argument("--scenes", type=int, default=512)
    arguments = parser.parse_args()
    gate(arguments.family, arguments.scenes)
