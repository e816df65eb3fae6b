"""``python -m uae.check`` of every complete configuration: the miniatures as they are, real systems with stand-ins for their weights.

    python -m benchmarks.conformance

Every configuration is checked in a process of its own. Real systems are checked as configured, and with what else can train.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, write
from uae.rehearsal.__main__ import quiet
from uae.rehearsal.catalog import write as write_stand_ins

ROOT = Path(__file__).parents[2]
DIFFUSION, TOKENS = "debug/rehearsal.yaml", "debug/rehearsal_tokens.yaml"
STAGE = "stages/understanding_for_generation.yaml"
CASES: dict[str, tuple[str, ...]] = {  # a configuration and what is put on top of it
    "tiny": (),
    "tiny, images": (STAGE,),
    "tiny_janus": (),
    **dict.fromkeys(("uae", "uniworld_v1", "metaquery", "qwen_any"), (DIFFUSION,)),
    "uae, full": ("finetune/full_pretrained.yaml", DIFFUSION),
    "uae, images": (STAGE, DIFFUSION),
    "janus_pro": (TOKENS,),
    "janus_pro, both": (TOKENS,),
    "emu3": (TOKENS,),
    "emu3, both": (TOKENS,),
    "x_omni, both": (TOKENS,),
    "bagel, joint": ("stages/joint.yaml", DIFFUSION),
    "omnigen2": (DIFFUSION,),
    "omnigen2, images": (STAGE, DIFFUSION),
}
HEAD = (
    "Measured numbers; **bold** where a check failed; empty where it is not applicable. Real systems have tiny random weights in the "
    "official layouts. Bounds and meanings are in docs/checking.md."
)
KEPT = RESULTS / "check.json"  # cases that are not asked for keep their rows
BOTH = "--model.init_args.train=both"
SMALL = {"emu3": 32, "x_omni": 64}  # pixels of a side that are 16 image tokens, not 4096 or 1024


def words_of(case: str) -> list[str]:
    """What follows ``python -m uae.check`` for a case, from the root of the checkout."""
    name = case.partition(",")[0]
    files = [word for delta in CASES[case] for word in ("--config", f"configs/{delta}")]
    sizes = [f"--model.init_args.system.init_args.{side}={SMALL[name]}" for side in ("height", "width") if name in SMALL]
    return [f"configs/{name}.yaml", *files, *[BOTH] * case.endswith("both"), *sizes]


def checked(case: str, stand_ins: Path) -> dict[str, Any]:
    """What was found, the command and the seconds of one case."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "check.json")
        words, start = [sys.executable, "-m", "uae.check", *words_of(case), "--json", str(target)], time.perf_counter()
        environment = {**os.environ, "UAE_CHECKPOINTS": str(stand_ins)}
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)
        seconds = round(time.perf_counter() - start, 1)
        if not target.is_file():
            raise RuntimeError(f"{case}: {done.stderr[-500:]}")
        (found,) = json.loads(target.read_text()).values()
    return {"command": " ".join(["python", *words[1:-2]]), "seconds": seconds, "found": found}


def markdown(report: dict[str, Any]) -> str:
    """A table: a row per check, a column per case."""
    names = list(dict.fromkeys(name for one in report.values() for name in one["found"]))
    lines = ["# Conformance of every complete configuration", "", HEAD]
    for start in range(0, len(report), 5):
        cases = list(report)[start : start + 5]
        lines += ["", f"| check | {' | '.join(cases)} |", "|---" * (len(cases) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(_cell(report[case]['found'].get(name)) for case in cases)} |" for name in names]
    counts = {
        case: [sum(one["verdict"] == verdict for one in report[case]["found"].values()) for verdict in ("passed", "failed")]
        for case in report
    }
    lines += ["", "| case | passed | failed | seconds | command |", "|---|---|---|---|---|"]
    lines += [f"| {case} | {passed} | {failed} | {report[case]['seconds']} | `{report[case]['command']}` |"
              for case, (passed, failed) in counts.items()]  # fmt: skip
    reasons = {f"{name}: {one['reason']}" for case in report.values() for name, one in case["found"].items()
               if one["verdict"] == "not applicable"}  # fmt: skip
    return "\n".join([*lines, "", "Not applicable, and why:", "", *(f"* {reason}" for reason in sorted(reasons))])


def _cell(found: dict[str, Any] | None) -> str:
    if found is None or found["verdict"] == "not applicable":
        return ""
    number = "no number" if found["measured"] is None else f"{found['measured']:.2g}"
    return number if found["verdict"] == "passed" else f"**{number}**"


def main(arguments: list[str] | None = None) -> None:
    """Check, write, and exit with 1 if something failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.conformance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="all, unless given")
    parser.add_argument("--stand_ins", type=Path, default=ROOT / "outputs/stand_ins", help="their folder, written if need be")
    options = parser.parse_args(arguments)
    quiet()
    write_stand_ins(options.stand_ins)
    report: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    for case in options.cases:
        report[case] = checked(case, options.stand_ins)
        failed = [name for name, one in report[case]["found"].items() if one["verdict"] == "failed"]
        print(case, f"{report[case]['seconds']} s", failed or "all passed", flush=True)
        report = {case: report[case] for case in CASES if case in report}
        write("check", report, markdown(report))
    raise SystemExit(any(one["verdict"] == "failed" for case in report.values() for one in case["found"].values()))


if __name__ == "__main__":
    main()
