"""A chart is true to its numbers, and its axes are round."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uae.report.drawing import HEIGHT, POINTS, WIDTH, draw, number

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)


def places(path):
    return [tuple(map(float, pair.split(","))) for pair in path.removeprefix("M").split()]


@given(VALUES)
def test_every_point_is_where_its_axes_say(values):
    """Read back from the path and two ticks of each axis, the curve is the one that was drawn."""
    picture = draw("title", {"a": list(enumerate(values))})
    (line,) = picture.lines
    top, bottom = picture.y[-1], picture.y[0]
    assert bottom.place > top.place
    assert -1 <= top.place <= HEIGHT + 1
    assert -1 <= bottom.place <= HEIGHT + 1
    drawn = places(line.measured)
    assert [x for x, _ in drawn] == pytest.approx([WIDTH * n / max(len(values) - 1, 1) for n in range(len(values))], abs=0.1)
    for (_, y), (_, other), value, another in zip(drawn, drawn[1:], values, values[1:], strict=False):
        assert (other - y) * (another - value) <= 1e-6 * max(abs(another), abs(value), 1) * HEIGHT  # up is more
    highest, lowest = (drawn[values.index(extreme)][1] for extreme in (max(values), min(values)))
    assert -0.1 <= highest <= lowest <= HEIGHT + 0.1


def test_axes_are_round_and_hold_the_curve():
    picture = draw("title", {"a": [(0, 0.31), (240, 0.79)], "b": [(80, 0.5)]})
    assert [tick.text for tick in picture.y] == ["0.2", "0.4", "0.6", "0.8"]
    assert [tick.text for tick in picture.x] == ["0", "100", "200"]
    assert sum(places(picture.lines[0].measured), ()) == pytest.approx((0, HEIGHT * 0.49 / 0.6, WIDTH, HEIGHT * 0.01 / 0.6), abs=0.1)
    assert picture.lines[1].last == "0.500"


def test_long_curves_become_means():
    curve = [(step, float(step % 2)) for step in range(10 * POINTS)]
    (line,) = draw("title", {"a": curve}).lines
    drawn = places(line.measured)
    assert len(drawn) == POINTS
    assert len({y for _, y in drawn}) == 1  # every mean is a half


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (3.0, "3"), (0.5, "0.500"), (12.345, "12.35"), (123456.7, "1.23e+05"), (0.00012, "0.00012"), (-2.5, "-2.500")],
)
def test_numbers_are_short(value, text):
    assert float(number(value)) == pytest.approx(float(text), rel=1e-2)
    assert len(number(value)) <= 9
    assert math.isclose(float(number(value)), value, rel_tol=6e-3)
