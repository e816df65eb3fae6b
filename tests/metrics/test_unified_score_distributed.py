import pytest
import torch

from tests.two_processes import run_on_two
from uae.encoders import LayoutEncoder
from uae.metrics import UnifiedScore

UNEVEN = ([[0, 1, 2, 3], [4, 5, 6], [7, 8]], [[9, 10, 0]])  # image 0 comes twice, as samplers pad
EMPTY = ([], [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]])  # one process sees no data


def scores(rank, cases):
    generator = torch.Generator().manual_seed(0)
    sources, noise = torch.rand(2, 11, 3, 8, 8, generator=generator)
    reconstructions = (sources + noise) / 2
    metric = UnifiedScore({"coarse": LayoutEncoder(2), "fine": LayoutEncoder(8)}, held_out=("fine",))
    results = []
    for shares in cases:
        metric.reset()
        for rows in shares[rank]:
            metric.update(reconstructions[rows], sources[rows], rows)
        results.append(metric.compute())
    return results


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_processes_equal_one():
    first, second = run_on_two(scores, [UNEVEN, EMPTY])
    assert first == second == scores(0, [[share[0] + share[1]] for share in (UNEVEN, EMPTY)])
    assert [result["n"] for result in first] == [11, 11]
