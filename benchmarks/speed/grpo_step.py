"""CPU seconds and memory of a GRPO step on captions beside TRL, see contestants.py.

    pip install -e ".[bench-peers]"
    python benchmarks/speed/grpo_step.py

Both run in processes of their own, in turns. Where TRL is not installed, plain rows take its place.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from typing import Any

import torch
from contestants import Case, ours, plain, trl
from racing import alone, median, report, table

CASES = {"64/32/8": 2, "256/32/8": 2, "256/128/8": 2, "1024/64/8": 1}  # rounds: the last one takes minutes
CONTESTANTS = {"ours": ours, "plain": plain, "trl": trl}
NAMES = {"trl": "TRL", "plain": "plain rows"}


def race(case: str, steps: int, rounds: int) -> dict[str, Any]:
    """Both in turns."""
    names = ["ours", "trl" if importlib.util.find_spec("trl") else "plain"]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[:: -1 if number % 2 else 1]:
            found[name].append(alone(__file__, "--contestant", name, "--cases", case, "--steps", str(steps)))
    seconds = {name: median([second for run in runs for second in run["cpu"]]) for name, runs in found.items()}
    memory = {name: median([run["peak_mib"] for run in runs]) for name, runs in found.items()}
    print(case, {name: round(second, 3) for name, second in seconds.items()}, flush=True)
    return {"case": case, "seconds": seconds, "peak_mib": memory, "runs": found}


def text(races: list[dict[str, Any]]) -> list[str]:
    """The table."""
    peers = [name for name in NAMES if name in races[0]["seconds"]]
    heads = ["vision tokens / caption tokens / group", "ours, s", "ours, MiB"]
    heads += [head for peer in peers for head in (f"{NAMES[peer]}, s", "ratio", f"{NAMES[peer]}, MiB", "ratio")]
    rows = []
    for one in races:
        seconds, memory = one["seconds"], one["peak_mib"]
        row = [one["case"], seconds["ours"], memory["ours"]]
        for peer in peers:
            row += [seconds[peer], seconds[peer] / seconds["ours"], memory[peer], memory[peer] / memory["ours"]]
        rows.append(row)
    return table(heads, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="vision tokens / caption tokens / group")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of a process; the first is not counted")
    parser.add_argument("--rounds", type=int, help="of every case; None is as many as the case has above")
    parser.add_argument("--contestant", choices=list(CONTESTANTS), help="only this one, once, as JSON")
    arguments = parser.parse_args()
    if arguments.contestant:
        torch.set_num_threads(1)
        sizes = Case(*map(int, arguments.cases[0].split("/")))
        print(json.dumps(CONTESTANTS[arguments.contestant](sizes, arguments.steps)))
        sys.exit()
    found = [race(case, arguments.steps, arguments.rounds or CASES.get(case, 2)) for case in arguments.cases]
    report("grpo_step", "python benchmarks/speed/grpo_step.py", text(found), found)
