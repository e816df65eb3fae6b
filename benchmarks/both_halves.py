"""Do both halves rise? The miniatures, trained in one half, in the other, or in both.

    python benchmarks/both_halves.py janus --seeds 0 1 2      # one network: captions | images | both
    python benchmarks/both_halves.py decoder --seeds 0 1 2    # stage 3 after stage 2, against more of stage 2

Every number is the run's own validation, before and after: greedy captions, their reconstructions, and images of the mini-GenEval
prompts. Results go to benchmarks/results/ as JSON and Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from runs import Run, train

RESULTS = Path(__file__).parent / "results"
COLUMNS = {
    "unified_score/held_out": "held out", "val_reward/mean": "reward", "caption/words": "words", "caption/full": "full",
    "caption/tiny_full": "tiny full", "reconstruction/whole": "whole", "reconstruction/faithful": "caption -> image, strict",
    "generation/overall": "mini-GenEval, strict",
}  # fmt: skip


def janus(args: argparse.Namespace) -> None:
    """Captions, images or both of the one network."""
    runs = {
        what: [
            Run(f"janus_{what}", seed, (), (f"--model.init_args.train={what}", *args.extra), "configs/tiny_janus.yaml")
            for seed in args.seeds
        ]
        for what in ("captions", "images", "both")
    }
    train([run for seeds in runs.values() for run in seeds], args.jobs)
    report("janus", {what: [summary(run) for run in seeds] for what, seeds in runs.items()})


def decoder(args: argparse.Namespace) -> None:
    """Stage 2; from its captioner, stage 3 and, for comparison, more of stage 2."""
    second = [Run("stage2", seed, (), ()) for seed in args.seeds]
    train(second, args.jobs)
    third, more = [], []
    for run in second:
        start = f"--model.init_args.finetune.init_args.adapter={run.folder / 'export'}"
        options = (start, f"--trainer.max_steps={args.steps}", *args.extra)
        stage = "configs/stages/understanding_for_generation.yaml"
        third.append(Run("stage3", run.seed, (stage,), options))
        more.append(Run("more_of_stage2", run.seed, (), options[:1]))
    train([*third, *more], args.jobs)
    rows = {"stage 2": second, "then stage 3": third, "then more of stage 2": more}
    report("decoder", {name: [summary(run) for run in runs] for name, runs in rows.items()})


def summary(run: Run) -> dict[str, dict[str, float]]:
    """What the run reports of itself."""
    return json.loads((run.folder / "summary.json").read_text())


def report(name: str, rows: dict[str, list[dict[str, dict[str, float]]]]) -> None:
    """A table of means and standard deviations over seeds, before the first row's runs and after each."""
    lines = ["| | n | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    first = next(iter(rows.values()))
    for label, runs, when in [("start", first, "before"), *((label, runs, "after") for label, runs in rows.items())]:
        cells = []
        for column in COLUMNS:
            values = [run[when][column] for run in runs]
            spread = f" ±{statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{1 if column == 'caption/words' else 3}f}{spread}")
        lines.append(f"| {label} | {len(runs)} | " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    print(text, flush=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(text + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for command in (janus, decoder):
        sub = commands.add_parser(command.__name__, help=command.__doc__)
        sub.set_defaults(run=command)
        sub.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        sub.add_argument("--jobs", type=int, default=2, help="runs at a time")
        sub.add_argument("--steps", type=int, default=120, help="of stage 3")
        sub.add_argument("--extra", nargs="*", default=[])
    arguments = parser.parse_args()
    arguments.run(arguments)
