import pytest
import torch

from tests.two_processes import run_on_two
from uae.encoders import LayoutEncoder
from uae.metrics import UnifiedScore

UNEVEN = ([[0, 1, 2, 3], [4, 5, 6], [7, 8]], [[9, 10, 0]])  # image 0 comes twice, as samplers pad
EMPTY = ([], [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]])  # one process sees no data
EMPTY_TOO = (EMPTY[1], [])
NOTHING = ([], [])  # an error everywhere, and nobody waits for the others
SINGLE = ([[0], [1]], [[0], [2]])  # batches of one: no neighbour, no floor; and the same image on both


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
        try:
            results.append(metric.compute())
        except ValueError as error:
            results.append(str(error))
    return results


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_processes_equal_one():
    cases = [UNEVEN, EMPTY, EMPTY_TOO, SINGLE, NOTHING]
    first, second = run_on_two(scores, cases, timeout=180)
    assert first == second == scores(0, [[share[0] + share[1]] for share in cases])
    assert "saw no image on any process" in first.pop()
    assert [result["n"] for result in first] == [11, 11, 11, 3]
    assert ["floor" in result for result in first] == [True, True, True, False]
