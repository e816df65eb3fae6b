"""The paper's claims in miniature: does one reward of reconstruction improve captions and images, and what else would have?

    python benchmarks/claims.py --seeds 0 1 2 3 4

Every case is a run of the command line; every number is taken afterwards, on scenes of the test split, by the exact detector
and by encoders that no reward uses. Runs that are complete are not repeated. Results go to benchmarks/results/claims.json and
claims.md.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from claims_table import markdown
from measuring import Scores, caption, controls, everything, scenes_of_test, trained
from results import write
from runs import Run

CAPTIONS = "configs/stages/generation_for_understanding.yaml"
IMAGES = "configs/stages/understanding_for_generation.yaml"
JOINT = "configs/stages/joint.yaml"
RANDOM = "configs/reward/random.yaml"
Measured = dict[str, Any]  # greedy or sampled to scores; at the start, case to that


@dataclass(frozen=True)
class Case:
    """One way to spend optimizer steps.

    Args:
        name: What the tables call it.
        configs: The stage, and what differs from it.
        steps: Optimizer steps.
        after: Name of the case it starts from; None is the cold start.
        aside: Whether it is no claim of the paper; such cases have at most three seeds.
    """

    name: str
    configs: tuple[str, ...]
    steps: int
    after: str | None = None
    aside: bool = False


@dataclass(frozen=True)
class Family:
    """A kind of unified model, and how long its stages are.

    Args:
        base: The complete configuration.
        third: The configuration files of stage 3.
        joint: The configuration files of both halves at once.
        captions, images: Optimizer steps of stages 2 and 3.
        image_cost, joint_cost: What an optimizer step of stage 3, or of both halves, costs; a step of captions costs 1. Measured
            on one thread, rollout and update together.
        options: Further arguments, by the first file of a stage.
        separate: Whether a network of its own draws. Then it is trained in full, too, and other orders of the stages are tried.
    """

    base: str
    third: tuple[str, ...]
    joint: tuple[str, ...]
    captions: int
    images: int
    image_cost: float
    joint_cost: float
    options: Mapping[str, tuple[str, ...]]
    separate: bool = False

    @property
    def cases(self) -> list[Case]:
        """All cases. Those that are compared with each other cost the same."""
        total = self.captions + self.images * self.image_cost
        half, rest = even(self.captions / 2), even(self.images / 2)
        claims = [
            Case("captions", (CAPTIONS,), self.captions),
            Case("captions, stage 3", self.third, self.images, "captions"),
            *([Case("captions, stage 3 in full", (*self.third, FULL), self.images, "captions")] if self.separate else []),
            Case("more captions", (CAPTIONS,), even(self.images * self.image_cost), "captions"),
            Case("joint", self.joint, even(total / self.joint_cost)),
            Case("random reward, captions", (CAPTIONS, RANDOM), self.captions),
            Case("random reward, stage 3", (*self.third, RANDOM), self.images, "captions"),
        ]
        asides = [
            Case("images alone", self.third, even(total / self.image_cost), aside=True),
            Case("turn 1: captions", (CAPTIONS,), half, aside=True),
            Case("turn 2: images", self.third, rest, "turn 1: captions", aside=True),
            Case("turn 3: captions", (CAPTIONS,), half, "turn 2: images", aside=True),
            Case("turn 4: images", self.third, rest, "turn 3: captions", aside=True),
        ]
        return [*claims, *asides] if self.separate else claims


MINIATURE, FULL = "configs/exploration/miniature.yaml", "configs/finetune/images_full.yaml"
FAMILIES = {
    "tiny": Family(
        "configs/tiny.yaml", (IMAGES, MINIATURE), (JOINT, MINIATURE), 160, 160, 1.1, 1.9,
        {IMAGES: ("--model.init_args.reconstructions=16",)}, separate=True,
    ),
    # One network: stage 3 trains captions, too, because images alone change the weights that captions come from.
    "janus": Family(
        "configs/tiny_janus.yaml", (JOINT,), (JOINT,), 160, 120, 1.8, 1.8,
        {CAPTIONS: ("--model.init_args.optimizer.init_args.lr=3e-4", "--data.init_args.batch_size=8")},
    ),
}  # fmt: skip


def even(steps: float) -> int:
    """The nearest number of steps that whole rollouts take, two or four each."""
    return 4 * round(steps / 4)


@dataclass(frozen=True)
class Job:
    """One case with one seed."""

    family: str
    case: str
    seed: int

    @property
    def run(self) -> Run:
        """The training, and those before it."""
        case = self._case
        start = None if case.after is None else Job(self.family, case.after, self.seed).run
        family = FAMILIES[self.family]
        options = family.options.get(case.configs[0], ())
        return Run(case.name, self.seed, family.base, case.configs, case.steps, options, start)

    @property
    def _case(self) -> Case:
        return next(case for case in FAMILIES[self.family].cases if case.name == self.case)

    @property
    def depth(self) -> int:
        """How many runs come before it."""
        after = self._case.after
        return 0 if after is None else 1 + Job(self.family, after, self.seed).depth

    def __call__(self, count: int) -> Measured:
        """Train and measure, unless it has been done."""
        torch.set_num_threads(1)
        run = self.run()
        path = run.folder / f"measured_{count}.json"
        return remembered(path, lambda: everything(trained(self.family, run.export), count, self.seed))


def at_the_start(family: str, seed: int, count: int) -> Measured:
    """The cold start and what it reaches by selection; needs the captions of the first stage."""
    torch.set_num_threads(1)
    captioner = trained(family, Job(family, "captions", seed).run.export)
    scenes = scenes_of_test(count)

    def measure() -> Measured:
        found = controls(family, caption(captioner, scenes, 0.0), count, seed)
        return {"start": everything(trained(family), count, seed), **{name: {"greedy": one} for name, one in found.items()}}

    return remembered(Job(family, "captions", seed).run.folder / f"controls_{count}.json", measure)


def remembered(path: Path, measure: Callable[[], Measured]) -> Measured:
    """What was measured before, or else what is measured now."""
    if not path.is_file():
        path.write_text(json.dumps(measure()))
    found: Measured = json.loads(path.read_text())
    return found


def waves(jobs: list[Job]) -> Iterator[list[Job]]:
    """Jobs in an order in which each comes after the one it starts from."""
    for depth in range(max(job.depth for job in jobs) + 1):
        yield [job for job in jobs if job.depth == depth]


def main(arguments: argparse.Namespace) -> None:
    """Train, measure, write."""
    measured: dict[str, dict[str, dict[str, list[Scores]]]] = {family: {} for family in arguments.families}
    jobs = [
        Job(family, case.name, seed)
        for number, seed in enumerate(arguments.seeds)
        for family in arguments.families
        for case in FAMILIES[family].cases
        if (arguments.cases is None or case.name in arguments.cases) and not (case.aside and number >= 3)
    ]
    found: dict[Job, Measured] = {}
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for wave in waves(jobs):
            for job, scores in zip(wave, pool.map(Job.__call__, wave, [arguments.scenes] * len(wave)), strict=True):
                found[job] = scores
                print(f"{job.family}, seed {job.seed}: {job.case}", flush=True)
        pairs = [(family, seed) for family in arguments.families for seed in arguments.seeds]
        starts = pool.map(at_the_start, *zip(*pairs, strict=True), [arguments.scenes] * len(pairs))
        for (family, _), start in zip(pairs, starts, strict=True):
            for name, scores in start.items():
                for how, one in scores.items():
                    measured[family].setdefault(name, {}).setdefault(how, []).append(one)
    for job, scores in found.items():
        for how, one in scores.items():
            measured[job.family].setdefault(job.case, {}).setdefault(how, []).append(one)
    table = markdown(measured, FAMILIES)
    print(table)
    write("claims", {"scenes": arguments.scenes, "seeds": arguments.seeds, "scores": measured}, table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--cases", nargs="+", default=None, help="names of cases; all if not given")
    parser.add_argument("--scenes", type=int, default=512, help="scenes; a multiple of 16")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, each on one thread")
    main(parser.parse_args())
