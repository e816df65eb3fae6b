"""An image counts once in a validation, however often loaders repeat it and on whatever process."""

import pytest
import torch
from torchmetrics import Metric

from tests.coldstart.test_module import Line
from tests.two_processes import run_on_two
from uae.coldstart import ColdStart
from uae.metrics import Once, part_of


class Rows(Metric):
    """Which images came, by a number in the batch."""

    def __init__(self):
        super().__init__()
        self.add_state("seen", [], dist_reduce_fx="cat")

    def update(self, texts, reconstructions_NCHW, batch):
        assert len(texts) == len(reconstructions_NCHW) == len(batch["name"]) == len(batch["image"])
        self.seen.append(batch["id"].float())

    def compute(self):
        seen = torch.cat(self.seen) if isinstance(self.seen, list) else self.seen
        return {"rows/count": len(seen), "rows/sum": seen.sum()}


def batch(*ids):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 24, 24, generator=generator)
    return {"image": images[list(ids)], "id": torch.tensor(ids), "name": [f"{i}.png" for i in ids], "caption": [str(i) for i in ids]}


REPEATED = [batch(0, 1), batch(2, 0, 2), batch(1)]
PLAIN = [batch(0, 1), batch(2)]


def loaded(batches):
    return torch.utils.data.DataLoader(batches, batch_size=None)


@pytest.mark.filterwarnings("ignore:.*num_workers|.*does not have many workers")
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_repeats_change_no_mean(build, trainer, stage):
    module = build(metrics={"rows": Rows()})
    run = trainer(limit_val_batches=1.0)
    logged = [getattr(run, stage)(module, loaded(batches), verbose=False)[0] for batches in (PLAIN, REPEATED, REPEATED)]
    assert logged[1] == pytest.approx(logged[0])
    assert logged[2] == logged[1]  # each validation begins anew
    assert logged[1]["rows/count"] == 3
    assert {"val_reward/mean", "test_reward/mean"} & set(logged[1])


class Brightness(Line):
    """The mean of the images, as a score."""

    def score(self, batch):
        assert len(batch["caption"]) == len(batch["image"])
        return {"brightness": batch["image"].mean().item()}


@pytest.mark.filterwarnings("ignore:.*num_workers|.*does not have many workers")
def test_a_cold_start_counts_an_image_once(trainer):
    scores = []
    for batches in (PLAIN, REPEATED, REPEATED):
        model = ColdStart(Brightness())
        scores.append(trainer(limit_val_batches=1.0).validate(model, loaded(batches), verbose=False)[0])
    (name,) = scores[0]
    expected = batch(0, 1, 2)["image"].mean().item()
    assert [score[name] for score in scores] == pytest.approx([expected] * 3)


def test_all_that_a_batch_says_stays_with_its_image():
    part = part_of(batch(3, 1, 4), [2, 0])
    assert (part["id"].tolist(), part["name"], part["caption"]) == ([4, 3], ["4.png", "3.png"], ["4", "3"])
    assert torch.equal(part["image"], batch(4, 3)["image"])


def new_on_two(rank):
    once = Once()
    found = [once.new(torch.tensor(ids)) for ids in STEPS[rank]]
    once.reset()
    return found, once.new(torch.tensor([1]))


STEPS = [[[1, 2, 1], [4], [6]], [[2, 3], [1, 4, 5], [7, 7]]]


@pytest.mark.slow
def test_the_first_of_several_processes_has_an_image():
    (first, again), (second, elsewhere) = run_on_two(new_on_two)
    assert first == [[0, 1], [0], [0]]
    assert second == [[1], [2], [0]]
    assert (again, elsewhere) == ([0], [])
