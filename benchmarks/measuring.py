"""What a miniature can do: its captions, its reconstructions, its images of prompts and its answers, all counted exactly.

Every number is taken on scenes of the test split, which no training has seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from uae.encoders import LayoutEncoder
from uae.metrics.unified_score import UnifiedScore
from uae.miniature.metrics.mini_geneval import mini_geneval
from uae.miniature.metrics.mini_mmt import likelihood, mini_mmt
from uae.miniature.metrics.scenes import SceneScore, shows
from uae.miniature.scenes import Scene, detect, is_detailed, parse, render, scene_of
from uae.miniature.tiny import Tiny, TinyCLIP, TinyJudge
from uae.miniature.tiny_janus import TinyJanus
from uae.models.exported import ADAPTER
from uae.models.finetune import Full, LoRA
from uae.policies import prepare
from uae.types import UMM, Sampling

Scores = dict[str, float]
SYSTEMS: dict[str, Any] = {"tiny": Tiny, "janus": TinyJanus}
ROWS = 64  # images at a time


def trained(family: str, export: Path | None = None, weights: Path | None = None, guidance: float = 1.0) -> UMM:
    """A miniature with the adapters that a run exported.

    Args:
        family: Which miniature.
        export: Folder of the adapters; None is the miniature as it was cold-started.
        weights: Folder of the weights below the adapters; None is the package's.
        guidance: Classifier-free guidance of the renderer.
    """
    umm: UMM = SYSTEMS[family](weights=None if weights is None else str(weights), guidance=guidance).build()
    if export is None:
        return umm
    captions, drawn = LoRA(adapter=str(export) if (export / ADAPTER).is_file() else None), export / "renderer"
    images = LoRA(adapter=str(drawn)) if (drawn / ADAPTER).is_file() else Full(weights=str(drawn)) if drawn.is_dir() else None
    return prepare(umm, "captions", (), captions, images)


def scenes_of_test(count: int) -> list[Scene]:
    """The first scenes of the test split."""
    return [scene_of(number, "test") for number in range(count)]


def caption(umm: UMM, scenes: list[Scene], temperature: float, seed: int = 0) -> list[str]:
    """One caption per scene; temperature 0 is greedy."""
    texts: list[str] = []
    for start in range(0, len(scenes), ROWS):
        part = scenes[start : start + ROWS]
        seeds = [seed * 1_000_003 + start + i for i in range(len(part))]
        texts += umm.captioner.sample(umm.captioner.prepare(render(part)), 1, Sampling(temperature, 32), seeds).texts
    return texts


def style_controls(umm: UMM, scenes: list[Scene], seed: int = 0, tries: int = 24) -> dict[str, list[str]]:
    """The starting policy's own detailed captions: A the first of 24 samples, B the likeliest of 24."""
    first, likeliest = [], []
    for start in range(0, len(scenes), 16):
        part = scenes[start : start + 16]
        seeds = [seed * 7_000_003 + start * tries + i for i in range(len(part) * tries)]
        rollout = umm.captioner.sample(umm.captioner.prepare(render(part)), tries, Sampling(1.0, 32), seeds)
        logp = (rollout.logp_RS * rollout.mask_RS).sum(1)
        for image in range(len(part)):
            rows = range(image * tries, (image + 1) * tries)
            detailed = [row for row in rows if is_detailed(rollout.texts[row])] or list(rows)
            first.append(rollout.texts[detailed[0]])
            likeliest.append(rollout.texts[max(detailed, key=lambda row: float(logp[row]))])
    return {"control A": first, "control B": likeliest}


@torch.no_grad()
def draw(umm: UMM, texts: list[str], seeds: list[int]) -> torch.Tensor:
    """One image per caption, ``[N, 3, 24, 24]`` in [0, 1]; ``seeds`` are those of the noise."""
    parts = [range(start, min(start + ROWS, len(texts))) for start in range(0, len(texts), ROWS)]
    drawn = [umm.renderer.render(umm.conditioner.encode([texts[n] for n in part]), [seeds[n] for n in part]) for part in parts]
    return torch.cat(drawn)


def reconstruction(umm: UMM, scenes: list[Scene], texts: list[str], seed: int = 0) -> Scores:
    """Scores of one caption per scene and of its image."""
    unified = UnifiedScore({"clip": TinyCLIP(), "judge": TinyJudge(), "layout": LayoutEncoder()}, ("judge", "layout"), bootstrap=0)
    exact, ids = SceneScore(), torch.arange(len(scenes))
    unified.load("cpu")
    sources = render(scenes)
    images = draw(umm, texts, (seed * len(scenes) + ids).tolist())
    unified.update(images, sources, ids=ids)
    exact.update(texts, images, {"image": sources, "scene": scenes})
    similarity = {f"unified_score/{name}": float(value) for name, value in unified.compute().items()}
    return {**similarity, **{name: float(value) for name, value in exact.compute().items()}}


def generation(umm: UMM, count: int, seed: int = 0, tries: int = 1) -> Scores:
    """Mini-GenEval: share of prompts whose image shows what they say and nothing else.

    Args:
        umm: The system; its captioner is not used.
        count: Number of prompts per task.
        seed: Random seed of the prompts.
        tries: Images per prompt, of which one has to be right. More than one is a selection by the truth.
    """
    return {f"generation/{task}": share for task, share in mini_geneval(umm, count, seed, tries).items()}


def best_of(umm: UMM, scenes: list[Scene], texts: list[str], tries: int) -> Scores:
    """What the exact detector would choose out of several images of each caption: selection by the truth, without learning."""
    repeated = [text for text in texts for _ in range(tries)]
    seen = detect(draw(umm, repeated, list(range(len(repeated)))))
    whole = faithful = 0
    for number, (scene, text) in enumerate(zip(scenes, texts, strict=True)):
        images, said = seen[number * tries : (number + 1) * tries], parse(text)
        whole += any(one == scene for one in images)
        faithful += said is not None and any(shows(one, said) for one in images)
    return {"reconstruction/whole": whole / len(scenes), "reconstruction/faithful": faithful / len(scenes)}


def understanding(umm: UMM, questions: int) -> Scores:
    """Mini-MMT: share of questions whose true caption is the likeliest of four."""
    found = mini_mmt(likelihood(umm.captioner), questions, seed=0, split="test")
    return {f"understanding/{subtask}": one.value for subtask, one in found.items()}


def everything(umm: UMM, count: int, seed: int) -> dict[str, Scores]:
    """Scores of greedy and of sampled captions. What does not depend on captions is in both.

    Args:
        umm: The system.
        count: Number of scenes. A quarter of it (a multiple of 4) is the number of questions per subtask, and half of it is the
            number of prompts per task.
        seed: Random seed of sampled captions, of prompts and of noise.
    """
    scenes = scenes_of_test(count)
    alone = {**generation(umm, count // 2, seed), **understanding(umm, count // 4)}
    return {
        name: {**reconstruction(umm, scenes, caption(umm, scenes, temperature, seed), seed), **alone}
        for name, temperature in (("greedy", 0.0), ("sampled", 1.0))
    }


def controls(family: str, captions: list[str], count: int, seed: int) -> dict[str, Scores]:
    """What the cold-started model reaches by selection alone.

    Args:
        family: Which miniature.
        captions: Captions of a trained captioner that the starting decoder draws several times.
        count: Number of scenes.
        seed: Random seed of samples and of noise.
    """
    umm, scenes = trained(family), scenes_of_test(count)
    found = {name: reconstruction(umm, scenes, texts, seed) for name, texts in style_controls(umm, scenes, seed).items()}
    return {**found, "best of 8": {**best_of(umm, scenes, captions, 8), **generation(umm, count // 8, seed, tries=8)}}
