"""A line chart as numbers for an SVG picture: paths, ticks and a legend. The template draws it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from uae.report.curves import Curve

WIDTH, HEIGHT = 360, 170  # of the area with the lines, in units of the picture
POINTS = 120  # of a line; more are averaged
WINDOW = 9  # points over which a line is smoothed


class Tick(NamedTuple):
    """A mark on an axis."""

    place: float
    text: str


class Line(NamedTuple):
    """One scalar: what was measured as a thin path, its moving mean as a thick one."""

    name: str
    measured: str
    smooth: str
    last: str


@dataclass(frozen=True)
class Picture:
    """A chart."""

    title: str
    lines: list[Line]
    x: list[Tick]
    y: list[Tick]
    width: int = WIDTH
    height: int = HEIGHT


def draw(title: str, curves: Mapping[str, Curve]) -> Picture:
    """Put curves, of which each has a point at least, into one picture."""
    thinned = {name: _thinned(curve) for name, curve in curves.items()}
    steps = [step for curve in thinned.values() for step, _ in curve]
    values = [value for curve in thinned.values() for _, value in curve]
    x, y = _ticks(min(steps), max(steps), 4, whole=True), _ticks(min(values), max(values), 4)
    left, right = min(steps), max(max(steps), min(steps) + 1)
    low, high = min(y[0], min(values)), max(y[-1], max(values))

    def path(curve: list[tuple[float, float]]) -> str:
        places = (
            f"{WIDTH * (step - left) / (right - left):.1f},{HEIGHT * (1 - (value - low) / (high - low)):.1f}" for step, value in curve
        )
        return "M" + " ".join(places)

    lines = [Line(name, path(curve), path(_smooth(curve)), number(curves[name][-1][1])) for name, curve in thinned.items()]
    return Picture(
        title,
        lines,
        [Tick(WIDTH * (step - left) / (right - left), text) for step, text in zip(x, _texts(x), strict=True) if left <= step <= right],
        [Tick(HEIGHT * (1 - (value - low) / (high - low)), text) for value, text in zip(y, _texts(y), strict=True)],
    )


def number(value: float) -> str:
    """A number in a few characters."""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}" if abs(value) >= 1e5 or abs(value) < 1e-3 else f"{value:.{max(0, 3 - len(str(int(abs(value)))) + 1)}f}"


def _texts(ticks: list[float]) -> list[str]:
    """Ticks as text, all with as many decimals as the distance between two of them needs."""
    distance = ticks[1] - ticks[0]
    if distance < 1e-4 or max(map(abs, ticks)) >= 1e6:
        return [f"{tick:.3g}" for tick in ticks]
    return [f"{tick:.{max(0, -math.floor(math.log10(distance) + 1e-9))}f}" for tick in ticks]


def _thinned(curve: Curve) -> list[tuple[float, float]]:
    """At most `POINTS` points, of which each is a mean of neighbours."""
    size = math.ceil(len(curve) / POINTS)
    parts = [curve[first : first + size] for first in range(0, len(curve), size)]
    return [(sum(step for step, _ in part) / len(part), sum(value for _, value in part) / len(part)) for part in parts]


def _smooth(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over a window around every point, which is narrower towards the ends; a few points stay as they are."""
    if len(curve) < 2 * WINDOW:
        return curve
    found = []
    for place, (step, _) in enumerate(curve):
        reach = min(WINDOW // 2, place, len(curve) - 1 - place)
        near = curve[place - reach : place + reach + 1]
        found.append((step, sum(value for _, value in near) / len(near)))
    return found


def _ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """About ``count`` round numbers whose range holds that from ``low`` to ``high``."""
    size = max(abs(low), abs(high))
    span = high - low if high - low > max(1e-6 * size, 1e-9) else max(size, 1.0)  # rounding of a constant is no curve
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= count)
    step = max(1.0, step) if whole else step
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * place, 12) for place in range(first, max(last, first + 1) + 1)]
