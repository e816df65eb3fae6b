import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.two_processes import run_on_two
from uae.data.sampler import EvalBatches, ImageLoader, TrainBatches
from uae.miniature.data import SceneData

COUNT, BATCH, WORLD = st.integers(1, 60), st.integers(1, 7), st.integers(1, 4)


@given(count=COUNT, batch=BATCH, world=WORLD, seed=st.integers(0, 9))
def test_train_ranks_are_disjoint_and_in_step(count, batch, world, seed):
    if count < batch * world:
        with pytest.raises(ValueError, match=r"data\.init_args\.batch_size"):
            TrainBatches(count, batch, 0, world, seed)
        return
    ranks = [list(TrainBatches(count, batch, rank, world, seed)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {count // (batch * world)}
    assert {len(positions) for batches in ranks for positions in batches} == {batch}
    seen = [position for batches in ranks for positions in batches for position in positions]
    assert len(set(seen)) == len(seen) == count // (batch * world) * batch * world
    assert set(seen) <= set(range(count))


@given(count=st.integers(12, 60), batch=BATCH)
def test_global_batches_do_not_depend_on_the_number_of_ranks(count, batch):
    if count < 2 * batch:
        return
    two = zip(*(TrainBatches(count, batch, rank, 2) for rank in range(2)), strict=True)
    assert [first + second for first, second in two] == list(TrainBatches(count, 2 * batch, 0, 1))


def test_every_epoch_and_seed_has_its_own_order():
    def order(epoch, seed=0):
        batches = TrainBatches(50, 50, 0, 1, seed)
        batches.set_epoch(epoch)
        return next(iter(batches))

    assert order(0) == order(0)
    assert len({tuple(order(epoch, seed)) for epoch in range(3) for seed in range(3)}) == 9
    # an image's place in one epoch says nothing about its place in the next
    assert abs(torch.corrcoef(torch.tensor([order(0), order(1)]).double())[0, 1]) < 0.5


@given(count=COUNT, batch=BATCH, world=WORLD)
def test_evaluation_sees_every_image_once_in_as_many_batches_on_every_rank(count, batch, world):
    ranks = [list(EvalBatches(count, batch, rank, world)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {-(-count // (batch * world))} == {len(EvalBatches(count, batch, 0, world))}
    assert all(1 <= len(positions) <= batch for batches in ranks for positions in batches)
    seen = sorted(position for batches in ranks for positions in batches for position in positions)
    assert set(seen) == set(range(count))
    assert len(seen) == max(count, len(ranks[0]) * world)  # repeats only where a rank would have nothing to do
    if count >= world and batch > 1:
        assert len(seen) == count


class Counting:
    def __init__(self):
        self.read = []

    def __len__(self):
        return 8

    def __getitems__(self, positions):
        self.read.append(positions)
        return {"id": torch.tensor(positions)}, {}


@pytest.mark.parametrize("position", range(12))
def test_repeats_read_once_and_resume_anywhere(position):
    def ids(loader):
        return [batch["id"].tolist() for batch in loader]

    whole = ids(ImageLoader(Counting(), TrainBatches(8, 2, 0, 1), repeats=3))
    assert len(whole) == 12
    assert whole == [batch for batch in whole[::3] for _ in range(3)]
    source = Counting()
    loader = ImageLoader(source, TrainBatches(8, 2, 0, 1), repeats=3)
    state = {"epoch": 0, "position": position, "images": 2, "repeats": 3}
    loader.load_state_dict(state)
    assert loader.state_dict() == state  # saved again before the first batch
    assert len(loader) == 12
    assert ids(loader) == whole[position:]
    assert len(source.read) == 4 - position // 3
    assert ids(loader) == whole  # the next epoch is whole


def test_resume_with_twice_the_ranks_continues_after_the_images_that_were_seen():
    one = ImageLoader(Counting(), TrainBatches(8, 2, 0, 1), repeats=3)
    stream = iter(one)
    for _ in range(2 * 3):
        next(stream)
    seen = {i for positions in one.loader.dataset.read for i in positions}
    rest = []
    for rank in range(2):
        loader = ImageLoader(Counting(), TrainBatches(8, 2, rank, 2), repeats=1)
        loader.load_state_dict(one.state_dict())
        rest += [i for batch in loader for i in batch["id"].tolist()]
    assert len(rest) == 4
    assert set(rest) | seen == set(range(8))


class Trivial(L.LightningModule):
    batches_per_rollout = 2

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.trainer.current_epoch, batch_idx, batch["id"].tolist()))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        assert batch["scene"]

    def predict_step(self, batch, batch_idx):
        return batch["id"].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def trainer(folder, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return L.Trainer(accelerator="cpu", default_root_dir=folder, max_epochs=3, **quiet, **options)


def data():
    return SceneData(batch_size=2, train_size=7, val_size=3, test_size=5, eval_batch_size=2)


def test_a_real_trainer_resumes_with_the_next_batch_from_every_step(tmp_path):
    straight = Trivial()
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, callbacks=[keep]).fit(straight, data())
    assert len(straight.seen) == 3 * 3 * 2
    for step in (1, 2, 5, 6, 7, 12, 17):  # inside a repeat, between repeats, at the end of an epoch
        resumed = Trivial()
        path = f"{tmp_path}/step={step}.ckpt"
        trainer(tmp_path, enable_checkpointing=False).fit(resumed, data(), ckpt_path=path)
        assert resumed.seen == straight.seen[step:], step


def test_resume_from_the_end_of_an_epoch_and_from_inside_validation(tmp_path):
    straight = Trivial()
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    trainer(tmp_path, callbacks=[keep], check_val_every_n_epoch=1).fit(straight, data())
    for epoch in (0, 1):
        resumed = Trivial()
        path = f"{tmp_path}/epoch={epoch}.ckpt"
        trainer(tmp_path, enable_checkpointing=False).fit(resumed, data(), ckpt_path=path)
        assert resumed.seen == straight.seen[6 * (epoch + 1) :]


def test_overfit_batches_repeats_the_same_images(tmp_path):
    module = Trivial()
    trainer(tmp_path, overfit_batches=2, enable_checkpointing=False).fit(module, data())
    assert [ids for _, _, ids in module.seen] == [[0, 1], [0, 1]] * 3


def fit_and_predict(rank, folder):
    module = Trivial()
    options = {"devices": 2, "strategy": "ddp", "enable_checkpointing": False}
    trainer(folder, **options).fit(module, data())  # Lightning's own samplers are on by default: they must not interfere
    predicted = trainer(folder, **options).predict(Trivial(), data())
    return module.seen, [i for batch in predicted for i in batch]


def test_two_processes_share_the_images(tmp_path):
    (first, first_predicted), (second, second_predicted) = run_on_two(fit_and_predict, str(tmp_path), timeout=300)
    assert [step[:2] for step in first] == [step[:2] for step in second]
    assert len(first) == 3 * 1 * 2  # 7 images, 4 per batch: 1 batch, twice, 3 epochs
    for (*_, ids), (*_, other) in zip(first, second, strict=True):
        assert len(ids) == len(other) == 2
        assert not set(ids) & set(other)
    offset = 2 * 2**40
    assert sorted(first_predicted + second_predicted) == [offset + i for i in range(5)]
