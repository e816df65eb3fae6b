"""Which pairs a contact sheet shows."""

import numpy as np
import pytest

from uae.bench.score.contact_sheet import worst_median_best


@pytest.mark.parametrize(("count", "expected"), [(1, [1, 0, 0]), (2, [1, 0, 1]), (3, [1, 1, 1]), (40, [4, 4, 4])])
def test_a_contact_sheet_shows_no_pair_twice(count, expected):
    chosen = worst_median_best(np.random.default_rng(0).permutation(count).astype(float))
    assert [len(positions) for positions in chosen.values()] == expected
    shown = [n for positions in chosen.values() for n in positions]
    assert len(shown) == len(set(shown))
