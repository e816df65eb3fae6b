"""The tables of claims.py: means over seeds with 95 % intervals, paired differences, and the paper's numbers beside them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

Scores = dict[str, float]
Measured = Mapping[str, Mapping[str, Sequence[Scores]]]  # case, then greedy or sampled, then one per seed

ROWS = {  # tag: what it is, and what the paper reports for the like of it
    "unified_score/held_out": ("held-out score", "Unified-Score 79.0 -> 86.1; 82.8 -> 89.1"),
    "unified_score/clip": ("score by the reward's encoder", "CLIP 85.5 -> 90.5"),
    "caption/words": ("words per caption", "captions grow longer"),
    "caption/recall": ("objects named", ""),
    "caption/precision": ("claims that are true", ""),
    "caption/full": ("objects with all attributes", "fine-grained perception 32.5 -> 56.9"),
    "caption/tiny_recall": ("tiny objects named", "small objects .05 -> .45"),
    "caption/tiny_full": ("tiny objects with all attributes", ""),
    "understanding/overall": ("mini-MMT", "MMB 83.5 -> 84.8, MMMU 58.6 -> 58.2; 79.2 -> 80.3, 41.0 -> 41.6"),
    "understanding/small_object": ("mini-MMT, small objects", ""),
    "generation/overall": ("mini-GenEval", "GenEval .84 -> .89; .80 -> .84"),
    "generation/single": ("... single object", ""),
    "generation/two": ("... two objects", ""),
    "generation/counting": ("... counting", ""),
    "generation/background": ("... background", ""),
    "generation/position": ("... position", ""),
    "generation/size": ("... size", ""),
    "reconstruction/faithful": ("caption drawn as it says", ""),
    "reconstruction/whole": ("image right in everything", ""),
}
COLUMNS = (
    "start", "control A", "control B", "best of 8", "captions", "captions, stage 3", "captions, stage 3 in full",
    "more captions", "joint",
    "random reward, captions", "random reward, stage 3", "images alone", "turn 4: images",
)  # fmt: skip
CLAIMS = (  # case, against, how, tags
    ("captions, stage 3", "start", "greedy", ("generation/overall", "reconstruction/whole", "unified_score/held_out")),
    ("captions, stage 3", "more captions", "greedy", ("generation/overall", "reconstruction/whole", "unified_score/held_out")),
    ("captions, stage 3 in full", "more captions", "greedy", ("generation/overall", "reconstruction/whole", "unified_score/held_out")),
    ("captions, stage 3 in full", "captions, stage 3", "greedy", ("generation/overall", "reconstruction/whole")),
    ("joint", "start", "greedy", ("generation/overall", "reconstruction/whole", "unified_score/held_out")),
    ("captions, stage 3", "control A", "sampled", ("unified_score/held_out", "reconstruction/whole")),
    ("captions, stage 3", "control B", "greedy", ("unified_score/held_out", "reconstruction/whole")),
    ("captions", "control A", "sampled", ("unified_score/held_out",)),
    ("captions", "control B", "greedy", ("unified_score/held_out",)),
    ("captions, stage 3", "captions", "greedy", ("understanding/overall", "caption/precision", "caption/full")),
    ("joint", "start", "greedy", ("understanding/overall", "caption/precision")),
    ("random reward, captions", "start", "greedy", ("unified_score/held_out", "caption/full")),
    ("random reward, stage 3", "captions", "greedy", ("generation/overall", "reconstruction/whole")),
    ("turn 4: images", "captions, stage 3", "greedy", ("caption/full", "generation/overall", "reconstruction/whole")),
    ("turn 4: images", "joint", "greedy", ("caption/full", "generation/overall", "reconstruction/whole")),
)
TURNS = (
    "start", "turn 1: captions", "turn 2: images", "turn 3: captions", "turn 4: images", "captions, stage 3", "joint", "images alone",
)  # fmt: skip


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval (Student's t over seeds); nan for a single value."""
    if len(values) < 2:
        return values[0], float("nan")
    spread = statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(stats.t.ppf(0.975, len(values) - 1)) * spread


def cell(tag: str, values: Sequence[float]) -> str:
    """``mean ±half width``."""
    mean, half = interval(values)
    digits = 1 if tag == "caption/words" else 3
    return f"{mean:.{digits}f}" + (f" ±{half:.{digits}f}" if half == half else "")


def ablated(rows: Mapping[str, Sequence[Mapping[str, float]]], columns: Mapping[str, str]) -> list[str]:
    """The lines of a table with one row per setting: means and 95 % intervals over its seeds.

    Args:
        rows: Scores of every seed, by the name of the row.
        columns: Headings, by the tag of the score.
    """
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, scores in rows.items():
        lines.append(f"| {name} | " + " | ".join(cell(tag, [one[tag] for one in scores]) for tag in columns) + " |")
    return lines


def of(measured: Measured, case: str, how: str, tag: str) -> list[float] | None:
    """The values of a case, one per seed; None where it was not measured so."""
    scores = measured.get(case, {})
    found = scores.get(how) or (scores.get("greedy") if case.startswith(("control", "best")) else None)
    return [one[tag] for one in found] if found and tag in found[0] else None


def grid(measured: Measured, how: str, columns: Sequence[str]) -> list[str]:
    """One table: a row per score, a column per case."""
    columns = [case for case in columns if case in measured]
    seeds = {case: len(next(iter(measured[case].values()))) for case in columns}
    heads = [case if seeds[case] == max(seeds.values()) else f"{case} ({seeds[case]} seeds)" for case in columns]
    lines = ["| | " + " | ".join(heads) + " | *published, the paper's models* |", "|---" * (len(columns) + 2) + "|"]
    for tag, (title, published) in ROWS.items():
        values = [of(measured, case, how, tag) for case in columns]
        if any(values):
            cells = [cell(tag, one) if one else "" for one in values]
            lines.append(f"| {title} | " + " | ".join(cells) + f" | {published} |")
    return lines


def differences(measured: Measured) -> list[str]:
    """Paired by seed: how much a case is above another, and whether their intervals touch. A case may lack the last seeds."""
    lines = ["| | against | captions | score | seeds | difference | intervals |", "|---" * 7 + "|"]
    for case, against, how, tags in CLAIMS:
        for tag in tags:
            these, those = of(measured, case, how, tag), of(measured, against, how, tag)
            if these and those:
                pairs = list(zip(these, those, strict=False))
                mean, half = interval([a - b for a, b in pairs])
                (one, wide), (two, other) = interval(these), interval(those)
                apart = "" if wide != wide else "apart" if abs(one - two) > wide + other else "touch"
                shown = f"{mean:+.3f}" + (f" ±{half:.3f}" if half == half else "")
                lines.append(f"| {case} | {against} | {how} | {ROWS[tag][0]} | {len(pairs)} | {shown} | {apart} |")
    return lines


def markdown(measured: Mapping[str, Measured], families: Mapping[str, Any]) -> str:
    """All tables of all families."""
    parts = []
    for family, scores in measured.items():
        seeds = max(len(found) for case in scores.values() for found in case.values())
        parts += [f"# {family}: {seeds} seeds, mean and 95 % interval", ""]
        parts += ["Optimizer steps: " + ", ".join(f"{case.name} {case.steps}" for case in families[family].cases) + ".", ""]
        for how in ("greedy", "sampled"):
            parts += [f"## {family}, {how} captions", "", *grid(scores, how, COLUMNS), ""]
        parts += [f"## {family}, in turns (greedy)", "", *grid(scores, "greedy", TURNS), ""]
        parts += [f"## {family}, paired differences", "", *differences(scores), ""]
    return "\n".join(parts)
