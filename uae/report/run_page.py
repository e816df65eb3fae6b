"""``report.html`` of a run: before and after, pictures, curves, health, times and settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from uae.files import examples
from uae.files.examples import Examples
from uae.report.charts import DASHBOARD
from uae.report.curves import Curve, read_curves
from uae.report.drawing import Picture, draw, number
from uae.report.page import embedded, embedded_tensor, write_page
from uae.report.settings import CONFIG, arguments_of, key_settings, read_config

PAGE = "report.html"
HEADLINES = ("unified_score/held_out", "val_reward/mean", "understanding/overall", "generation/overall")
HEALTH, HACKING = "callbacks.health.Health", "callbacks.hacking.RewardHacking"
FILES = {  # what the folder of a run may hold, and what it is
    "summary.json": "every validation metric before and after",
    "config.yaml": "the configuration as it was resolved; --config takes it",
    "export": "the result, for PEFT or transformers",
    "checkpoints": "to continue, and to evaluate (--ckpt_path)",
    "examples.png": "the pictures of this page",
    "hacking.png": "images whose reward ranks above their held-out score",
    "stages.md": "all stages of this command in one table",
    "stacks": "where the run stood still",
}


class Change(NamedTuple):
    """A metric before and after the run, as text."""

    name: str
    before: str
    after: str
    change: str


class Sign(NamedTuple):
    """A number that shows whether a run is healthy."""

    what: str
    tag: str
    seen: str
    limit: str
    bad: bool


class Shown(NamedTuple):
    """One validation image: addresses of pictures, and captions."""

    source: str
    before: tuple[str, str] | None
    after: tuple[str, str] | None


def write_run_page(folder: Path) -> Path:
    """Write ``report.html`` in the folder of a run, from whatever files the run has left there.

    Returns:
        The page.

    Raises:
        FileNotFoundError: The folder holds no run.
    """
    summary, config, curves = _summary(folder), read_config(folder), read_curves(folder)
    if not summary and not curves:
        raise FileNotFoundError(
            f"{str(folder)!r} is not the folder of a run (it has neither a summary.json, nor events of TensorBoard, nor a "
            "metrics.csv); give one like outputs/tiny"
        )
    before, after = summary.get("before", {}), summary.get("after", {})
    write_page(
        folder / PAGE,
        "run.html",
        title=folder.resolve().name,
        about=_about(folder, summary, config, curves),
        headlines=[one for name in HEADLINES for one in changes(before, after) if one.name == name],
        metrics={part: list(some) for part, some in groupby(changes(before, after), key=lambda one: one.name.partition("/")[0])},
        stages=_stages(folder),
        examples=list(_examples(folder)),
        charts=charts(curves),
        signs=list(signs(curves, config)),
        hacking=_picture(folder / "hacking.png"),
        times=times(summary),
        settings=key_settings(config),
        config=(folder / CONFIG).read_text(encoding="utf-8") if config else "",
        files={name: what for name, what in FILES.items() if (folder / name).exists()},
    )
    return folder / PAGE


def changes(before: Mapping[str, float], after: Mapping[str, float]) -> list[Change]:
    """All metrics, ordered by the first part of their names as they come first."""
    names = list(dict.fromkeys([*before, *after]))
    parts = list(dict.fromkeys(name.partition("/")[0] for name in names))
    ordered = sorted(names, key=lambda name: parts.index(name.partition("/")[0]))
    return [Change(name, *_cells(before.get(name), after.get(name))) for name in ordered]


def charts(curves: Mapping[str, Curve]) -> dict[str, list[Picture]]:
    """Question to its charts, as far as there are scalars."""
    pictures = {
        question: [draw(chart.title, {tag: curves[tag] for tag in tags}) for chart in some if (tags := chart.found_in(curves))]
        for question, some in DASHBOARD.items()
    }
    return {question: some for question, some in pictures.items() if some}


def signs(curves: Mapping[str, Curve], config: Mapping[str, Any]) -> Iterator[Sign]:
    """What `callbacks.health.Health` and `callbacks.hacking.RewardHacking` watch, with the limits of this run."""
    limits = arguments_of(config, HEALTH)
    for policy in ("policy", "image_policy"):
        gap = config.get("model", {}).get("init_args", {}).get("ratio_tolerance")
        yield from _largest(curves, "Sampler and training code disagree, largest |ratio - 1|", f"{policy}/sampler_gap", gap)
        yield from _largest(curves, "Policy ratio, largest", f"{policy}/ratio_max", limits.get("max_ratio"))
        yield from _largest(curves, "Divergence from the start, largest, nats per action", f"{policy}/kl", limits.get("max_kl"))
    if curve := curves.get("policy/entropy"):
        first = curve[: int(limits.get("patience", 10))]
        share = curve[-1][1] / max(sum(value for _, value in first) / len(first), 1e-12)
        least = limits.get("min_entropy")
        known = "" if least is None else f"at least {number(least)}"
        bad = least is not None and share < least
        yield Sign("Entropy at the end, as a share of the start's", "policy/entropy", number(share), known, bad)
    if curve := curves.get("reward/zero_variance"):
        mean = sum(value for _, value in curve) / len(curve)
        yield Sign("Groups whose rewards are all equal, mean share", "reward/zero_variance", number(mean), "below 1", mean >= 1)
    yield from _largest(curves, "Updates that were skipped", "health/skipped_updates", 0.0)
    if curve := curves.get("hacking/alarm"):
        alarms = [step for step, value in curve if value]
        seen = f"at step {', '.join(map(str, alarms))}" if alarms else f"none in {len(curve)} validations"
        yield Sign("The reward rises alone (reward hacking)", "hacking/alarm", seen, "none", bool(alarms))


def times(summary: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Name, seconds, and share of each stage, the longest first, then of everything else."""
    seconds, stages = summary.get("seconds", 0.0), summary.get("stages", {})
    rest = max(0.0, seconds - sum(stages.values()))
    rows = [*sorted(stages.items(), key=lambda one: -one[1]), ("validation and all else", rest)]
    return [(name, taken, taken / max(seconds, 1e-9)) for name, taken in rows] if seconds else []


def _largest(curves: Mapping[str, Curve], what: str, tag: str, limit: float | None) -> Iterator[Sign]:
    if curve := curves.get(tag):
        step, worst = max(curve, key=lambda point: point[1])
        seen = number(worst) + (f" (step {step})" if worst else "")
        known = "" if limit is None else f"at most {number(limit)}"
        yield Sign(what, tag, seen, known, limit is not None and worst > limit)


def _cells(old: float | None, new: float | None) -> tuple[str, str, str]:
    cells = ["" if value is None else f"{value:.4f}" for value in (old, new)]
    return cells[0], cells[1], "" if old is None or new is None else f"{new - old:+.4f}"


def _summary(folder: Path) -> dict[str, Any]:
    file = folder / "summary.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _about(folder: Path, summary: Mapping[str, Any], config: Mapping[str, Any], curves: Mapping[str, Curve]) -> list[str]:
    """One line about the run, in parts."""
    record = folder / "run.json"
    run = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    steps = summary.get("steps", max((curve[-1][0] for curve in curves.values()), default=0))
    least = config.get("trainer", {}).get("max_steps")
    known = f"{steps} of {least} steps" if least and least > 0 else f"{steps} steps"
    took = f"in {duration(summary['seconds'])}" if "seconds" in summary else ""
    started = f"started {run['started']}" if "started" in run else ""
    return [part for part in (run.get("labels", ""), f"{known} {took}".strip(), started) if part]


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _stages(folder: Path) -> dict[str, Any]:
    """The table of all stages that one command has trained; empty if it was one."""
    file = folder / "stages.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _examples(folder: Path) -> Iterator[Shown]:
    file = folder / "examples.pt"
    if not file.is_file():
        return
    kept = examples.load(file)
    sources: list[Tensor] = kept["after"]["source"] or kept["before"]["source"]
    for place, source in enumerate(sources):
        yield Shown(embedded_tensor(source), *(_redrawn(kept[time], place) for time in ("before", "after")))


def _redrawn(some: Examples, place: int) -> tuple[str, str] | None:
    """The picture and the caption of one image at one time."""
    if place >= len(some["caption"]):
        return None
    return embedded_tensor(some["reconstruction"][place]), some["caption"][place]


def _picture(file: Path) -> str:
    """A picture in its size, or nothing."""
    if not file.is_file():
        return ""
    with Image.open(file) as image:
        return embedded(image, max(image.size))
