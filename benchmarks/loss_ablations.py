"""What losses, corrections and rewards do, on the captions of the first miniature, one change at a time.

    python benchmarks/loss_ablations.py --seeds 0 1 2

Every row is a stage 2 of equally many optimizer steps: the same data, and the settings of configs/tiny.yaml but for the change that
its name says. The last two rows train on scenes that carry a word, three tiny letters side by side. All are measured by greedy
captions of scenes, and of words, that no training has seen, and by encoders that no reward uses. Results
go to benchmarks/results/loss_ablations.json and .md, of the seeds that are complete; what has been done is not done again.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import eq

import torch
from ablations import MODEL, arguments_of, every_seed
from claims import CAPTIONS, Measured, remembered
from measuring import caption, draw, reconstruction, scenes_of_test, trained
from runs import Run

from uae.miniature.scenes import Scene, detect, parse, scene_of, word_of
from uae.rewards import LengthBand
from uae.types import UMM

STEPS = 120
LOSSES = ("dr_grpo", "gspo", "cispo", "sapo", "kl_ratio", "entropy_bonus", "top_entropy", "dapo", "dynamic_sampling")
SYSTEM, REWARD = f"{MODEL}.system", f"{MODEL}.reward.init_args"
BAND = LengthBand(shortest=8, longest=12, margin=8)  # the words of a scene in detail are about 19
COLUMNS = {
    "unified_score/held_out": "held out", "caption/full": "full", "caption/tiny_full": "tiny full", "caption/precision": "precision",
    "caption/words": "words", "caption/in_band": "words in band", "reconstruction/whole": "right in everything",
    "words/said": "word said", "words/redrawn": "word redrawn",
}  # fmt: skip


def biased(**settings: float | bool) -> tuple[str, ...]:
    """Options of a sampler that is off."""
    inner = [f"{SYSTEM}.init_args.{key}={str(value).lower()}" for key, value in settings.items()]
    return (f"{SYSTEM}=benchmarks.agreement.biased.Biased", *inner, f"{MODEL}.ratio_tolerance=1000")


def part(name: str, reward: str, weight: float, **settings: object) -> tuple[str, ...]:
    """Options that add a part to the reward."""
    inner = [f"{REWARD}.parts.{name}.init_args.{key}={value}" for key, value in settings.items()]
    return (f"{REWARD}.parts.{name}={reward}", *inner, f"{REWARD}.weights.{name}={weight}")


def settings(seed: int) -> Iterator[tuple[str, Run]]:
    """Every row of the table: what is changed, and the run."""

    def row(name: str, configs: tuple[str, ...] = (), options: tuple[str, ...] = ()) -> tuple[str, Run]:
        return name, Run(f"loss {name}", seed, "configs/tiny.yaml", (CAPTIONS, *configs), STEPS, options)

    yield row("grpo, the default")
    for loss in LOSSES:
        options = (f"{MODEL}.loss.max_tokens=32",) if loss == "dr_grpo" else ()
        yield row(loss, (f"configs/loss/{loss}.yaml",), options)
    for name, sampler in {"bfloat16": biased(half=True), "temperature 1.5": biased(temperature=1.5)}.items():
        yield row(f"sampler: {name}", options=sampler)
        yield row(f"sampler: {name}, corrected", ("configs/loss/correction.yaml",), sampler)
    band = part("band", "uae.rewards.LengthBand", 0.3, shortest=BAND.shortest, longest=BAND.longest, margin=BAND.margin)
    yield row("reward: CLIP and a length band, summed", options=band)
    yield row("reward: CLIP and a length band, by themselves (GDPO)", ("configs/loss/gdpo.yaml",), band)
    tiles = part("tiles", "uae.rewards.RegionSimilarity", 1.0, encoder="uae.miniature.tiny.TinyCLIP", tiles=3, temperature=0.1)
    yield row("reward: CLIP and CLIP of tiles", options=tiles)
    words = ("--data.init_args.words=true",)
    yield row("words: CLIP", options=words)
    yield row("words: CLIP and fidelity of the word", options=(*words, *part("word", "uae.miniature.tiny.WordFidelity", 0.5)))


def words(umm: UMM, count: int, seed: int) -> Measured:
    """Shares of scenes with a word whose greedy caption says all its letters in order, and whose reconstruction shows them."""
    scenes = [scene_of(number, "test", words=True) for number in range(count)]
    texts = caption(umm, scenes, 0.0)
    images = draw(umm, texts, [seed * count + number for number in range(count)])
    said = [word_of(parse(text) or Scene(None, ())) for text in texts]
    pairs = {"said": said, "redrawn": [word_of(scene) for scene in detect(images)]}
    true = [word_of(scene) for scene in scenes]
    return {f"words/{name}": sum(map(eq, found, true)) / count for name, found in pairs.items()}


def measure(run: Run, count: int) -> Measured:
    """Train and measure one row with one seed, unless it has been done."""
    torch.set_num_threads(1)
    run()

    def greedy() -> Measured:
        umm, scenes = trained("tiny", run.export), scenes_of_test(count)
        texts = caption(umm, scenes, 0.0)
        in_band = sum(BAND.score(text) == 0 for text in texts) / len(texts)
        return {**reconstruction(umm, scenes, texts, run.seed), "caption/in_band": in_band, **words(umm, count, run.seed)}

    return remembered(run.folder / f"measured_{count}.json", greedy)


if __name__ == "__main__":
    every_seed("loss_ablations", settings, measure, COLUMNS, f"{STEPS} steps of stage 2, ", arguments_of(__doc__))
