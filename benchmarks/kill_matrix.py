"""Runs killed at random moments, and asked to end: does every one of them continue to the bit?

    python -m benchmarks.kill_matrix                # about 15 minutes on two cores

Per trial a tiny run (8 optimizer steps, a checkpoint every two) is killed at a random moment between its start and its
end, by SIGKILL to all its processes at once, to one of them (the other is killed when the scheduler would), or inside the
writing of a checkpoint; or it is asked to end by SIGTERM. It is then continued with ``ckpt_path: last``, sometimes killed
again, until it ends. Losses of all steps, and weights and optimizer states of the last checkpoint, must equal those of
the uninterrupted run, bit for bit.

Writes ``benchmarks/results/kills.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.utils._pytree import tree_flatten

from benchmarks.kill_trials import MODES, STEPS, start
from uae.checkpoints.files import PARTIAL, read, read_metadata
from uae.checkpoints.shards import PlainPlanner, ShardReader

RESULTS = Path(__file__).parent / "results"
LIMIT = 400.0  # seconds for a run to end, on a busy machine


def losses(folder: Path) -> dict[int, set[str]]:
    """Every loss that was seen at a step, over all attempts."""
    file, seen = folder / "losses.jsonl", {}
    for line in file.read_text().splitlines() if file.exists() else ():
        row = json.loads(line)
        seen.setdefault(row["step"], set()).add(row["loss"])
    return seen


def finish(processes: list[int], limit: float = LIMIT) -> list[int]:
    """Wait for processes; their exit statuses (a signal is negative). After the limit they are killed."""
    deadline, statuses = time.monotonic() + limit, {}
    while len(statuses) < len(processes):
        for process in set(processes) - statuses.keys():
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                statuses[process] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)
    return [statuses[process] for process in processes]


def wait_for(condition: Callable[[], bool], processes: list[int], limit: float = LIMIT) -> bool:
    """Poll; False if the run ended first."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.002)
        if any(os.waitid(os.P_PID, one, os.WEXITED | os.WNOHANG | os.WNOWAIT) for one in processes):
            return False
    return False


def strike(processes: list[int], number: int, which: str, draw: random.Random) -> None:
    """Send a signal to all processes, or to one."""
    for process in processes if which == "all" else [draw.choice(processes)]:
        os.kill(process, number)


def checkpoints(folder: Path) -> tuple[int, int]:
    """How many checkpoints have their name, and how many of those cannot be loaded."""
    named = [path for path in (folder / "checkpoints").glob("*.ckpt") if path.exists()]
    corrupt = 0
    for path in named:
        try:
            read_metadata(path) if path.is_dir() else read(path)
        except ValueError:
            corrupt += 1
    return len(named), corrupt


def kill(mode: str, folder: Path, moment: str, seconds: float, draw: random.Random) -> dict[str, Any]:
    """Start a run and kill it once; what was found on the disk."""
    processes = start(mode, folder)
    here = folder / "checkpoints"
    if moment == "writing":
        after = draw.randrange(0, STEPS - 3, 2)  # the first save after this step
        begun = wait_for(lambda: max(losses(folder), default=0) > after, processes)
        struck = begun and wait_for(lambda: any(here.glob(f"*{PARTIAL}")), processes)
        time.sleep(draw.random() * 0.01)
    elif moment == "starting":
        time.sleep(draw.uniform(0.1, seconds * 0.5))
        struck = True
    else:
        after = draw.randrange(1, STEPS)
        struck = wait_for(lambda: max(losses(folder), default=0) >= after, processes)
        time.sleep(draw.uniform(0.0, seconds * 0.1))
    which = draw.choice(["all", "one"]) if len(processes) > 1 else "all"
    strike(processes, signal.SIGKILL, which, draw)
    if which == "one":  # its peers notice, or the scheduler's patience ends
        time.sleep(1.0)
        strike(processes, signal.SIGKILL, "all", draw)
    finish(processes)
    partial = len(list(here.glob(f"*{PARTIAL}")))
    named, corrupt = checkpoints(folder)
    step = max(losses(folder), default=0)
    return {"struck": struck, "processes": which, "step": step, "partial": partial, "named": named, "corrupt": corrupt}


def compare(folder: Path, straight: Path, statuses: list[int]) -> str:
    """Nothing, or how a continued run differs from the uninterrupted one."""
    if any(statuses):
        return f"exit statuses {statuses}"
    seen, expected = losses(folder), losses(straight)
    if seen != expected:
        return f"losses differ first at step {min(s for s in expected if seen.get(s) != expected[s])}"
    last = f"checkpoints/step={STEPS}.ckpt"
    ours, theirs = (content(one / last) for one in (folder, straight))
    if ours.keys() != theirs.keys():
        return "the last checkpoints hold different things"
    return "".join(f"{name} differs; " for name, one in theirs.items() if not torch.equal(ours[name], one))


def content(path: Path) -> dict[str, Tensor]:
    """Weights and optimizer states of a checkpoint."""
    if path.is_dir():
        stored = ShardReader(path).read_metadata().state_dict_metadata
        state = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in stored.items() if hasattr(one, "size")}
        dcp.load(state, storage_reader=ShardReader(path), planner=PlainPlanner(), no_dist=True)
        return state
    checkpoint = read(path)
    leaves, _ = tree_flatten({name: checkpoint[name] for name in ("state_dict", "optimizer_states", "lr_schedulers")})
    return {str(n): torch.as_tensor(leaf) for n, leaf in enumerate(leaves) if isinstance(leaf, float | int | Tensor)}


def kill_trial(mode: str, folder: Path, moment: str, straight: Path, seconds: float, draw: random.Random) -> dict:
    """A run killed once or twice, then continued to its end."""
    kills = [kill(mode, folder, moment, seconds, draw)]
    if draw.random() < 0.25:
        kills.append(kill(mode, folder, "training", seconds, draw))
    fault = compare(folder, straight, finish(start(mode, folder)))
    left = [path.name for path in (folder / "checkpoints").iterdir() if PARTIAL in path.name]
    return {"signal": "SIGKILL", "moment": moment, "kills": kills, "fault": fault, "left": left}


def term_trial(mode: str, folder: Path, straight: Path, seconds: float, draw: random.Random) -> dict:
    """A run asked to end, sometimes twice; then continued to its end."""
    processes = start(mode, folder)
    wait_for(lambda: all((folder / f"listening{rank}").exists() for rank in range(len(processes))), processes)
    time.sleep(draw.uniform(0.0, seconds * 0.6))
    which = draw.choice(["all", "one"]) if len(processes) > 1 else "all"
    twice = draw.random() < 0.5
    running = not any(os.waitid(os.P_PID, one, os.WEXITED | os.WNOHANG | os.WNOWAIT) for one in processes)
    strike(processes, draw.choice([signal.SIGTERM, signal.SIGUSR1]) if not twice else signal.SIGTERM, which, draw)
    if twice:
        time.sleep(draw.random())
        strike([one for one in processes if _alive(one)], signal.SIGTERM, "all", draw)
    statuses = finish(processes)
    named, corrupt = checkpoints(folder)
    step = max(losses(folder), default=0)
    asked = {"struck": running, "processes": which, "twice": twice, "step": step, "statuses": statuses}
    fault = f"exit statuses {statuses}" if any(statuses) else "" if named else "no checkpoint"
    fault = fault or compare(folder, straight, finish(start(mode, folder)))
    return {"signal": "SIGTERM", "moment": "listening", "kills": [asked | {"named": named, "corrupt": corrupt}], "fault": fault}


def _alive(process: int) -> bool:
    return not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def report(trials: list[dict], seconds: float) -> str:
    """A table, and the two numbers that must be 0."""
    rows = ["| mode | signal | moment | trials | died mid-write | corrupt | diverged |", "|---|---|---|--:|--:|--:|--:|"]
    keys = sorted({(t["mode"], t["signal"], t["moment"]) for t in trials})
    for key in keys:
        some = [t for t in trials if (t["mode"], t["signal"], t["moment"]) == key]
        mid = sum(any(k.get("partial") for k in t["kills"]) for t in some)
        corrupt = sum(k["corrupt"] for t in some for k in t["kills"])
        rows.append(f"| {' | '.join(key)} | {len(some)} | {mid} | {corrupt} | {sum(bool(t['fault']) for t in some)} |")
    kills = [t for t in trials if t["signal"] == "SIGKILL"]
    terms = [t for t in trials if t["signal"] == "SIGTERM" and t["kills"][0]["struck"]]  # not those that had ended by then
    clean = sum(not any(t["kills"][0]["statuses"]) for t in terms)
    return "\n".join([
        "# Runs killed and continued",
        "",
        f"{len(kills)} runs killed ({sum(len(t['kills']) for t in kills)} kills, "
        f"{sum(any(k['partial'] for k in t['kills']) for t in kills)} with a half-written checkpoint on the disk): "
        f"{sum(k['corrupt'] for t in trials for k in t['kills'])} corrupt checkpoints, "
        f"{sum(bool(t['fault']) for t in kills)} that differ from the uninterrupted run in any bit of a loss or a weight.",
        f"{len(terms)} runs asked to end: {clean} with exit status 0 and a checkpoint, "
        f"{sum(bool(t['fault']) for t in terms)} that failed or differ.",
        "",
        *rows,
        "",
        f"{seconds:.0f} seconds. `python -m benchmarks.kill_matrix`; every trial is in `kills.json`.",
        "",
    ])  # fmt: skip


def plan(kills: int, terms: int) -> list[tuple[str, str, str]]:
    """Mode, signal and moment of every trial, spread evenly."""
    modes, moments = list(MODES), ["writing", "training", "training", "writing", "starting"]
    planned = [(modes[i % 4], "SIGKILL", moments[i // 4 % 5]) for i in range(kills)]
    return planned + [(modes[i % 4], "SIGTERM", "listening") for i in range(terms)]


def run_straight(mode: str, folder: Path) -> float:
    """The uninterrupted run, and how many seconds it took."""
    begun = time.monotonic()
    statuses = finish(start(mode, folder))
    if any(statuses) or len(losses(folder)) != STEPS:
        raise RuntimeError(f"the uninterrupted run failed:\n{(folder / 'log').read_text()[-3000:]}")
    return time.monotonic() - begun


def attempt(job: tuple) -> dict[str, Any]:
    """One trial."""
    mode, what, moment, folder, straight, seconds, seed = job
    draw, begun = random.Random(seed), time.monotonic()
    if what == "SIGKILL":
        trial = kill_trial(mode, folder, moment, straight, seconds, draw)
    else:
        trial = term_trial(mode, folder, straight, seconds, draw)
    log = {"log": (folder / "log").read_text()[-3000:]} if trial["fault"] else {}
    return {"mode": mode, **trial, **log, "seconds": round(time.monotonic() - begun, 1)}


def main() -> None:
    """Try, compare, write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24, help="Runs to kill.")
    parser.add_argument("--terms", type=int, default=12, help="Runs to ask to end.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    parser.add_argument("--workers", type=int, default=2, help="Trials at a time.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder for kills.json and kills.md.")
    options = parser.parse_args()
    begun, trials = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name, get_context("fork").Pool(options.workers) as pool:
        straight = {mode: Path(name, "straight", mode) for mode in MODES}
        seconds = dict(zip(MODES, pool.starmap(run_straight, straight.items()), strict=True))
        jobs = [
            (mode, what, moment, Path(name, str(number)), straight[mode], seconds[mode], f"{options.seed}/{number}")
            for number, (mode, what, moment) in enumerate(plan(options.kills, options.terms))
        ]
        for trial in pool.imap_unordered(attempt, jobs):
            trials.append(trial)
            print(json.dumps(trial), flush=True)
    options.results.mkdir(exist_ok=True)
    (options.results / "kills.json").write_text(json.dumps({"seed": options.seed, "trials": trials}, indent=1) + "\n")
    (options.results / "kills.md").write_text(report(trials, time.monotonic() - begun))
    print(report(trials, time.monotonic() - begun))
    raise SystemExit(any(t["fault"] or any(k["corrupt"] for k in t["kills"]) for t in trials))


if __name__ == "__main__":
    main()
