"""What the miniature learns: the decoder's gate, the sweep over seeds with its controls, the ablations.

    python benchmarks/miniature.py gate
    python benchmarks/miniature.py sweep --seeds 0 1 2 --variants lora full random
    python benchmarks/miniature.py ablate --seeds 0 1 2 --steps 60

Every number is taken on scenes of the test split; results go to benchmarks/results/ as JSON and Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from runs import Run, train

from uae.encoders import LayoutEncoder, similarity
from uae.metrics.unified_score import UnifiedScore
from uae.miniature.metrics.mini_geneval import mini_geneval
from uae.miniature.metrics.scenes import SceneScore, agreement, shows
from uae.miniature.pretraining.contrastive import edit
from uae.miniature.scenes import TERSE, Detail, describe, detect, is_detailed, parse, render, scene_of
from uae.miniature.tiny import Tiny, TinyCLIP, TinyJudge
from uae.models.finetune import Full, LoRA
from uae.types import UMM, Sampling

RESULTS = Path(__file__).parent / "results"
COLUMNS = {
    "unified_score/held_out": "held out", "unified_score/judge": "judge", "unified_score/layout": "layout",
    "unified_score/clip": "clip (reward)", "caption/words": "words", "caption/valid": "valid", "caption/recall": "recall",
    "caption/precision": "precision", "caption/full": "full", "caption/tiny_recall": "tiny recall",
    "caption/tiny_full": "tiny full", "reconstruction/whole": "whole", "reconstruction/faithful": "caption -> image, strict",
}  # fmt: skip
VARIANTS = {
    "lora": ("configs/finetune/lora.yaml",),
    "full": ("configs/finetune/full.yaml",),
    "random": ("configs/finetune/lora.yaml", "configs/reward/random.yaml"),
}


# ---------------------------------------------------------------------------------------------- measuring


def score(umm: UMM, scenes: list[Any], texts: list[str]) -> dict[str, float]:
    """Every score of one caption per scene; renderer noise is the scene's number."""
    unified = UnifiedScore(
        {"clip": TinyCLIP(), "judge": TinyJudge(), "layout": LayoutEncoder()}, ("judge", "layout"), bootstrap=0
    )
    exact = SceneScore()
    unified.load("cpu")
    for start in range(0, len(scenes), 64):
        part, words = scenes[start : start + 64], texts[start : start + 64]
        sources = render(part)
        with torch.no_grad():
            images = umm.renderer.render(umm.conditioner.encode(words), list(range(start, start + len(part))))
        unified.update(images, sources, ids=torch.arange(start, start + len(part)))
        exact.update(words, images, {"image": sources, "scene": part})
    return {
        **{f"unified_score/{k}": float(v) for k, v in unified.compute().items()},
        **{k: float(v) for k, v in exact.compute().items()},
    }


def caption(umm: UMM, scenes: list[Any], temperature: float, seed: int = 0) -> list[str]:
    """One caption per scene."""
    texts = []
    for start in range(0, len(scenes), 64):
        part = scenes[start : start + 64]
        context = umm.captioner.prepare(render(part))
        seeds = [seed * 1_000_003 + start + i for i in range(len(part))]
        texts += umm.captioner.sample(context, 1, Sampling(temperature, 32), seeds).texts
    return texts


def controls(umm: UMM, scenes: list[Any], seed: int = 0, tries: int = 24) -> dict[str, list[str]]:
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
    return {"A (first detailed of 24)": first, "B (likeliest detailed of 24)": likeliest}


# ---------------------------------------------------------------------------------------------- commands


def gate(args: argparse.Namespace) -> None:
    """The decoder on ground-truth captions, and what an error in the caption costs the reward."""
    umm, rng = Tiny().build(), random.Random(0)
    scenes = [scene_of(i, "test") for i in range(args.scenes)]
    encoder = TinyCLIP().load("cpu")
    source_vectors = encoder.embed(render(scenes))

    def draw(texts: list[str]) -> torch.Tensor:
        with torch.no_grad():
            parts = [range(i, min(i + 64, len(texts))) for i in range(0, len(texts), 64)]
            return torch.cat([umm.renderer.render(umm.conditioner.encode([texts[n] for n in p]), p) for p in parts])

    def closeness(images: torch.Tensor) -> torch.Tensor:
        return similarity(encoder.embed(images), source_vectors)

    def reward(texts: list[str]) -> torch.Tensor:
        return closeness(draw(texts))

    detailed = draw([describe(s) for s in scenes])
    rows, exact = {"detailed": closeness(detailed)}, agreement(detect(detailed), scenes)
    for attribute in ("color", "shape", "size", "place", "background"):
        rows[f"wrong {attribute}"] = reward([describe(edit(s, rng, attribute)) for s in scenes])
    rows["no background"] = reward([describe(s, Detail(background=False)) for s in scenes])
    rows["no sizes"] = reward([describe(s, Detail(size=False)) for s in scenes])
    rows["no positions"] = reward([describe(s, Detail(position=False)) for s in scenes])
    rows["tiny omitted"] = reward([describe(s, Detail(omit_tiny=1.0), rng) for s in scenes])
    rows["terse"] = reward([describe(s, TERSE, rng) for s in scenes])
    rows["words shuffled"] = reward([" ".join(rng.sample(w := describe(s).split(), len(w))) for s in scenes])
    rows["other scene"] = reward([describe(s) for s in scenes[1:] + scenes[:1]])
    rows["empty"] = reward([""] * len(scenes))
    table = ["| caption | reward | cost |", "|---|---|---|"]
    for name, values in rows.items():
        table.append(f"| {name} | {values.mean():.3f} | {(rows['detailed'] - values).mean():+.3f} |")
    unsaid, geneval = variation(umm), mini_geneval(umm)
    for title, numbers in (
        (f"Detailed ground-truth captions of {args.scenes} scenes, by the exact detector", exact),
        ("One terse caption under 64 noises: distinct values of what it does not say", unsaid),
        ("Mini-GenEval, strict, 64 prompts per task", geneval),
    ):
        table.append(f"\n{title}: " + ", ".join(f"{name} {value:.3g}" for name, value in numbers.items()) + ".")
    print("\n".join(table))
    report = {
        "gate": exact,
        "ladder": {k: float(v.mean()) for k, v in rows.items()},
        "unsaid": unsaid,
        "mini_geneval": geneval,
    }
    write("gate", report, "\n".join(table))


def variation(umm: UMM, text: str = "a red square") -> dict[str, int]:
    """How many values each unsaid attribute takes over 64 noises, and in how many images what was said is there."""
    with torch.no_grad():
        seen = detect(umm.renderer.render(umm.conditioner.encode([text] * 64), list(range(64))))
    said = parse(text)
    if said is None:
        raise ValueError(f"{text!r} is not a valid caption")
    claim = said.objects[0]
    found = [o for s in seen for o in s.objects if (o.color, o.shape) == (claim.color, claim.shape)]
    counts = {name: len({getattr(o, name) for o in found}) for name in ("size", "row", "column")}
    strict = sum(shows(s, said) for s in seen)
    return {
        **counts,
        "background": len({s.background for s in seen}),
        "said object drawn": len(found),
        "strictly": strict,
    }


def trained(folder: Path, full: bool) -> UMM:
    """The miniature with a run's trained weights."""
    umm = Tiny().build()
    (Full() if full else LoRA()).attach(umm.captioner, keep_reference=False)
    checkpoint = torch.load(next(folder.rglob("last.ckpt")), weights_only=True)["state_dict"]
    weights = {name.removeprefix("policy."): value for name, value in checkpoint.items()}
    unexpected = umm.captioner.learner.network.load_state_dict(weights, strict=False).unexpected_keys
    if unexpected:
        raise RuntimeError(f"{folder}: unexpected keys {unexpected[:3]}")
    return umm


def sweep(args: argparse.Namespace) -> None:
    """Every variant over the seeds, sampled and greedy, beside the start and its style controls."""
    options = (f"--trainer.max_steps={args.steps}", *args.extra)
    runs = [
        Run(variant, seed, VARIANTS[variant], options) for seed, variant in itertools.product(args.seeds, args.variants)
    ]
    train(runs, args.jobs)
    scenes = [scene_of(i, "test") for i in range(args.scenes)]
    base = Tiny().build()
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        for name, texts in controls(base, scenes, seed).items():
            rows.setdefault(name, []).append(score(base, scenes, texts))
        rows.setdefault("start, T=1", []).append(score(base, scenes, caption(base, scenes, 1.0, seed)))
    rows["start, greedy"] = [score(base, scenes, caption(base, scenes, 0.0))]
    show(rows)
    for variant, seed in itertools.product(args.variants, args.seeds):
        umm = trained(Run(variant, seed, (), ()).folder, full=variant == "full")
        rows.setdefault(f"{variant}, T=1", []).append(score(umm, scenes, caption(umm, scenes, 1.0, seed)))
        rows.setdefault(f"{variant}, greedy", []).append(score(umm, scenes, caption(umm, scenes, 0.0)))
        write("sweep", {"steps": args.steps, "scenes": args.scenes, "rows": rows}, show(rows))


def ablate(args: argparse.Namespace) -> None:
    """Noise, KL coefficient and group size at a reduced number of steps."""
    cases: dict[str, list[str]] = {
        "reference (G=8, shared noise, beta 0)": [],
        "independent noise": ["--model.init_args.shared_noise=false"],
        "beta 0.02": ["--model.init_args.loss.beta=0.02"],
        "G=4": ["--model.init_args.group=4"],
        "G=16": ["--model.init_args.group=16"],
    }
    scenes = [scene_of(i, "test") for i in range(args.scenes)]
    rows: dict[str, list[dict[str, float]]] = {}
    fixed = (f"--trainer.max_steps={args.steps}", f"--trainer.val_check_interval={args.steps}", *args.extra)
    runs = {
        (name, seed): Run(f"ablate{i}", seed, VARIANTS["lora"], (*fixed, *options))
        for seed in args.seeds
        for i, (name, options) in enumerate(cases.items())
    }
    train(list(runs.values()), args.jobs)
    for name, seed in itertools.product(cases, args.seeds):
        umm = trained(runs[name, seed].folder, full=False)
        rows.setdefault(name, []).append(score(umm, scenes, caption(umm, scenes, 1.0, seed)))
        write("ablation", {"steps": args.steps, "scenes": args.scenes, "rows": rows}, show(rows))


def show(rows: dict[str, list[dict[str, float]]]) -> str:
    """A Markdown table of means and, over several seeds, standard deviations."""
    table = ["| | n | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, scores in rows.items():
        cells = []
        for column in COLUMNS:
            values = [one[column] for one in scores]
            spread = f" ±{statistics.stdev(values):.3f}" if len(values) > 1 else ""
            digits = 1 if column == "caption/words" else 3
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        table.append(f"| {name} | {len(scores)} | " + " | ".join(cells) + " |")
    text = "\n".join(table)
    print(text, flush=True)
    return text


def write(name: str, report: dict[str, Any], text: str) -> None:
    """Results as JSON and Markdown."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(text + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for command in (gate, sweep, ablate):
        sub = commands.add_parser(command.__name__, help=command.__doc__)
        sub.set_defaults(run=command)
        sub.add_argument("--scenes", type=int, default=512)
        sub.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        sub.add_argument("--jobs", type=int, default=2, help="runs at a time")
        sub.add_argument("--steps", type=int, default=240 if command is sweep else 60)
        sub.add_argument("--variants", nargs="+", default=list(VARIANTS))
        sub.add_argument("--extra", nargs="*", default=[])
    arguments = parser.parse_args()
    arguments.run(arguments)
