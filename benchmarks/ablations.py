"""What the settings of the stages do, on the first miniature, one at a time.

    python benchmarks/ablations.py --seeds 0 1 2

All stages are half as long as in benchmarks/claims.py, whose first half of stage 2 is where stage 3 starts from, with the same
seed. All rows of a stage draw the same number of images per optimizer step. Results go to benchmarks/results/ablations.json and
ablations.md, of the seeds that are complete; what has been done is not done again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from claims import FAMILIES, Job, Measured, even, remembered
from claims_table import ablated
from measuring import caption, generation, reconstruction, scenes_of_test, trained
from results import write
from runs import RUNS, Run

from uae.miniature.tiny import WEIGHTS

TINY = FAMILIES["tiny"]
MODEL = "--model.init_args"
ERRORS = (0.1, 0.2, 0.3)
COLUMNS = {
    "unified_score/held_out": "held out", "caption/full": "caption full", "caption/precision": "precision",
    "generation/overall": "mini-GenEval", "reconstruction/faithful": "drawn as it says", "reconstruction/whole": "whole",
}  # fmt: skip
LAYOUT = (
    f"{MODEL}.reward.init_args.parts.layout=uae.rewards.EncoderSimilarity",
    f"{MODEL}.reward.init_args.parts.layout.init_args.encoder=uae.encoders.LayoutEncoder",
    f"{MODEL}.reward.init_args.weights.layout=1.0",
)
GUIDED = f"{MODEL}.system.init_args.guidance=2.0"


def settings(seed: int) -> Iterator[tuple[str, Run]]:
    """Every row of the table: what is changed, and the run."""
    captions, images, joint = (Job("tiny", name, seed).run for name in ("turn 1: captions", "turn 2: images", "joint"))
    joint = replace(joint, name="ablated joint", steps=even(joint.steps / 2))

    def having(run: Run, name: str, *options: str) -> Run:
        return replace(run, name=f"{run.name} {name}", options=(*run.options, *options))

    yield "stage 2", captions
    yield "stage 2: KL .02", having(captions, "kl", f"{MODEL}.loss.beta=0.02")
    yield "stage 2, drawn with guidance 2", replace(captions, options=(GUIDED,))  # the same training
    yield "stage 3", images
    yield from errors(captions, images)
    for count in (2, 4, 8):
        options = (f"{MODEL}.reconstructions={count}", f"--data.init_args.batch_size={64 // count}")
        yield f"stage 3: M {count}, batch {64 // count}", having(images, f"m {count}", *options)
    for level in (0.3, 1.0):
        yield f"stage 3: noise {level}", having(images, f"noise {level}", f"{MODEL}.exploration.noise_level={level}")
    for window, start in ((1, "0"), (1, "random"), (2, "random")):
        options = (f"{MODEL}.exploration.window={window}", f"{MODEL}.exploration.start={start}")
        where = "anywhere" if start == "random" else "the first"
        yield f"stage 3: window {window}, {where}", having(images, f"window {window} {start}", *options)
    yield "stage 3: window 3 (all)", having(images, "window 3", f"{MODEL}.exploration.window=3")  # the last step is never random
    yield "stage 3: KL .01", having(images, "kl", f"{MODEL}.image_loss.init_args.beta=0.01")
    full = f"{MODEL}.image_finetune=uae.models.finetune.Full"
    yield "stage 3: full, rate 1e-4", having(images, "full", full, f"{MODEL}.image_lr=1.0e-4")
    yield "stage 3: reward with layout", having(images, "layout", *LAYOUT)
    for update in ("guided", "conditional"):
        option = f"{MODEL}.exploration.guidance_in_update={update}"
        yield f"stage 3: guidance 2, {update} update", having(images, f"guidance {update}", GUIDED, option)
    yield "joint", joint
    for weight in (0.5, 2.0):
        yield f"joint: image_weight {weight}", having(joint, f"weight {weight}", f"{MODEL}.image_weight={weight}")


def errors(captions: Run, images: Run) -> Iterator[tuple[str, Run]]:
    """Rows of decoders that learnt from captions with other error rates."""
    for error in ERRORS:
        weights = f"{MODEL}.system.init_args.weights={decoder(error)}"
        second = replace(captions, name=f"captions error {error}", options=(weights,))
        third = replace(images, name=f"images error {error}", options=(*images.options, weights), start=second)
        yield f"error rate {error}: stage 2", second
        yield f"error rate {error}: stage 3", third


def decoder(error: float) -> Path:
    """The folder of the miniature whose decoder was continued on captions with an error rate."""
    return RUNS / f"weights-error-{error}"


def make_decoder(error: float) -> None:
    """Continue the decoder on captions with another error rate, unless it has been done."""
    folder = decoder(error)
    if (folder / "done").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(WEIGHTS, folder)
    options = ("--trainer.max_steps=200", f"{MODEL}.folder={folder}", f"--run_name=claims/decoder-error-{error}")
    objective = f"{MODEL}.objective.init_args.error={error}"
    command = [sys.executable, "-m", "uae.cli", "fit", "--config", "configs/pretrain/refine.yaml", *options, objective]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    (folder / "done").touch()


def measure(run: Run, count: int) -> Measured:
    """Train and measure one row with one seed, unless it has been done."""
    torch.set_num_threads(1)
    if run.start is not None:
        run.start()
    run()

    guidance = 2.0 if GUIDED in run.options else 1.0

    def greedy() -> Measured:
        weights = [Path(option.partition("=")[2]) for option in run.options if ".system.init_args.weights=" in option]
        umm = trained("tiny", run.export, *weights, guidance=guidance)
        scenes = scenes_of_test(count)
        texts = caption(umm, scenes, 0.0)
        return {**generation(umm, count // 4, run.seed), **reconstruction(umm, scenes, texts, run.seed)}

    return remembered(run.folder / f"ablated_{count}_guidance_{guidance}.json", greedy)


def main(arguments: argparse.Namespace) -> None:
    """Make the decoders, then train, measure and write."""
    with ProcessPoolExecutor(arguments.jobs) as pool:
        list(pool.map(make_decoder, ERRORS))
    every_seed("ablations", settings, measure, COLUMNS, "", arguments)


def every_seed(
    name: str,
    settings: Callable[[int], Iterator[tuple[str, Run]]],
    measure: Callable[[Run, int], Measured],
    columns: dict[str, str],
    what: str,
    arguments: argparse.Namespace,
) -> None:
    """Train and measure the rows of a table, and write it, one seed after the other.

    Args:
        name: Name of the files in benchmarks/results/.
        settings: The rows with a seed: what is changed, and the run.
        measure: Scores of a run on a number of scenes.
        columns: Headings of the table, by the tag of the score.
        what: What the rows are, before the number of seeds in the line above the table.
        arguments: Seeds, scenes and jobs, see `arguments_of`.
    """
    found: dict[str, list[dict[str, float]]] = {row: [] for row, _ in settings(0)}
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for number, seed in enumerate(arguments.seeds, 1):
            rows = sorted(settings(seed), key=lambda row: row[1].start is not None)  # no two processes train the same stage 2
            measured = pool.map(measure, [run for _, run in rows], [arguments.scenes] * len(rows))
            for (row, _), scores in zip(rows, measured, strict=True):
                found[row].append(scores)
                print(f"seed {seed}: {row}: held out {scores['unified_score/held_out']:.3f}", flush=True)
            report = {"scenes": arguments.scenes, "seeds": arguments.seeds[:number], "rows": found}
            head = f"{what}{number} seeds, mean and 95 % interval, greedy captions."
            write(name, report, "\n".join([head, "", *ablated(found, columns)]))


def arguments_of(description: str | None) -> argparse.Namespace:
    """Seeds, scenes and jobs from the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=512, help="scenes; a multiple of 8")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, each on one thread")
    return parser.parse_args()


if __name__ == "__main__":
    main(arguments_of(__doc__))
