"""Rows of similar length together, so that little is computed for padding."""

from __future__ import annotations

from collections.abc import Sequence


def alike(lengths: Sequence[int], fewest: int, share: float) -> list[list[int]]:
    """Numbers of rows in groups of similar length, the longest first.

    Args:
        lengths: Length of every row, in tokens.
        fewest: A group has at least so many rows, but for the last.
        share: Beyond them, a row that is shorter than this share of the group's longest begins another group.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not groups or len(groups[-1]) >= fewest and lengths[row] < share * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    return groups
