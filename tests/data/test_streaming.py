"""Streams: the same number of batches on every rank, every image once per pass, and resume at any batch."""

import itertools
import tarfile

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.data.archives import add, numbers_of, picture, write_shard, write_shards
from tests.data.test_sampler import Trivial, trainer
from tests.two_processes import run_on_two
from uae.data import WebDatasetData
from uae.data.sampler import ImageLoader
from uae.data.shards import TarShards, list_shards
from uae.data.source import id_of
from uae.data.streaming import SequentialSource, StreamBatches, StreamSource
from uae.files.pictures import Reading

READING = Reading(4)


def loader(folder, epoch_size=40, batch=4, rank=0, world=1, lanes=1, workers=0, readers=None, buffer=8, repeats=1, **options):
    shards = TarShards(*list_shards(str(folder), "data.root"), 2**20)
    source = StreamSource(shards, READING, epoch_size, batch * world, lanes, readers or max(1, workers), 0, buffer, **options)
    return ImageLoader(source, StreamBatches(epoch_size, batch, rank, world), repeats, workers)


def numbers(batches):
    return [number for batch in batches for number in numbers_of(batch)]


@pytest.mark.parametrize(("shards", "lanes", "readers"), [(4, 1, 1), (4, 4, 1), (4, 2, 2), (1, 4, 1), (8, 4, 1), (2, 2, 2)])
def test_a_pass_over_equal_shares_sees_every_image_once(tmp_path, shards, lanes, readers):
    write_shards(tmp_path, shards, 40 // shards)
    batches = list(loader(tmp_path, lanes=lanes, readers=readers))
    assert len(batches) == 10
    assert sorted(numbers(batches)) == list(range(40))
    for batch in batches:
        assert batch["name"] == [f"{n // (40 // shards):03}.tar/{n:05}.png" for n in numbers_of(batch)]
        assert batch["caption"] == [f"photograph {n}" for n in numbers_of(batch)]
        assert batch["id"].tolist() == [id_of(name) for name in batch["name"]]


def test_every_epoch_has_its_own_order_and_the_buffer_mixes_shards(tmp_path):
    write_shards(tmp_path)
    whole = loader(tmp_path, buffer=64)
    orders = []
    for epoch in range(3):
        whole.sampler.set_epoch(epoch)
        orders.append(numbers(whole))
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert len({number // 10 for number in orders[0][:10]}) >= 3
    unshuffled = loader(tmp_path, shuffle=False)
    first = numbers(unshuffled)
    unshuffled.sampler.set_epoch(1)
    assert numbers(unshuffled) == first  # overfit_batches


@pytest.mark.parametrize("sizes", [(1, 19), (3, 0), (1, 1)])
def test_ranks_stay_in_step_whatever_the_shards_hold(tmp_path, sizes):
    for shard, size in enumerate(sizes):
        write_shard(tmp_path / f"{shard}.tar", range(shard * 20, shard * 20 + size))
    ranks = [list(loader(tmp_path, rank=rank, world=2, lanes=2)) for rank in range(2)]
    assert [[len(batch["name"]) for batch in rank] for rank in ranks] == [[4] * 5] * 2


def test_the_order_survives_another_number_of_ranks_and_workers_read_disjoint_lanes(tmp_path):
    write_shards(tmp_path, shards=8, each=5)
    one = [numbers_of(batch) for batch in loader(tmp_path, batch=8, lanes=4)]
    two = [list(loader(tmp_path, batch=4, rank=rank, world=2, lanes=4)) for rank in range(2)]
    assert [numbers_of(first) + numbers_of(second) for first, second in zip(*two, strict=True)] == one
    inside = [numbers_of(batch) for batch in loader(tmp_path, batch=8, lanes=4, readers=2)]
    assert [numbers_of(batch) for batch in loader(tmp_path, batch=8, lanes=4, workers=2)] == inside


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_the_middle_of_a_shard_continues_with_the_next_image(tmp_path, workers):
    write_shards(tmp_path, shards=5, each=8, broken=(3, 11, 12, 30))
    options = {"workers": workers, "readers": 2, "repeats": 2, "buffer": 3}
    straight = loader(tmp_path, **options)
    epochs = []
    for epoch in range(2):
        straight.sampler.set_epoch(epoch)
        epochs.append([(numbers_of(batch), batch["name"]) for batch in straight])
    for epoch, position in ((0, 1), (0, 7), (1, 4), (1, 19)):
        resumed = loader(tmp_path, **options)
        resumed.sampler.set_epoch(epoch)
        resumed.load_state_dict({"epoch": epoch, "position": position, "images": 4, "repeats": 2})
        assert [(numbers_of(batch), batch["name"]) for batch in resumed] == epochs[epoch][position:]


def test_a_real_trainer_resumes_a_stream(tmp_path):
    write_shards(tmp_path / "s", shards=3, each=5)

    def data():
        options = {"image_size": 4, "val_share": 0.0, "test_share": 0.0, "num_workers": 0, "shuffle_buffer": 4}
        return WebDatasetData(root=str(tmp_path / "s"), epoch_size=12, batch_size=3, **options)

    straight = Trivial()
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, callbacks=[keep]).fit(straight, data())
    assert len(straight.seen) == 3 * 4 * 2
    for step in (1, 6, 8, 13, 23):
        resumed = Trivial()
        trainer(tmp_path, enable_checkpointing=False).fit(resumed, data(), ckpt_path=f"{tmp_path}/step={step}.ckpt")
        assert resumed.seen == straight.seen[step:], step


def broken_shards(folder):
    """Four of six shards: missing, no archive, cut off, overwritten in the middle."""
    write_shards(folder, shards=6, each=10)
    (folder / "001.tar").unlink()
    (folder / "002.tar").write_bytes(b"<html>404</html>" * 100)
    content = bytearray((folder / "003.tar").read_bytes())
    (folder / "003.tar").write_bytes(content[: len(content) // 2 + 100])
    content = bytearray((folder / "004.tar").read_bytes())
    content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
    (folder / "004.tar").write_bytes(content)
    return folder / "{000..005}.tar"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:unreadable")
def test_broken_shards_are_named_and_the_rest_is_used(tmp_path, workers):
    run = loader(broken_shards(tmp_path), epoch_size=60, workers=workers)
    batches = list(run)
    assert [len(batch["name"]) for batch in batches] == [4] * 15
    seen = set(numbers(batches))
    assert seen >= {*range(10), *range(50, 60)}
    assert {number // 10 for number in seen} == {0, 3, 4, 5}
    assert {"001.tar", "002.tar", "003.tar", "004.tar"} == set(run.skipped)
    assert "FileNotFoundError" in run.skipped["001.tar"]
    assert "corrupted" in run.skipped["002.tar"]


@pytest.mark.parametrize("broken", ["images", "archives", "absent"])
def test_nothing_readable_is_an_error_and_no_endless_search(tmp_path, broken):
    write_shards(tmp_path, shards=3, each=4, broken=range(12) if broken == "images" else ())
    for file in tmp_path.glob("*.tar"):
        if broken == "archives":
            file.write_bytes(b"x" * 2000)
    files = tmp_path / ("{10..12}.tar" if broken == "absent" else "{000..002}.tar")
    run = loader(files)
    reason = {"images": r"png: none of BMP", "archives": r"\.tar: ValueError", "absent": r"\.tar: FileNotFoundError"}[broken]
    with pytest.raises(ValueError, match=rf"no image of the 3 shards .* is readable: .*{reason}"):
        next(iter(run))
    shards = TarShards(*list_shards(str(files), "data.root"), 2**20)
    with pytest.raises(ValueError, match="no image of the 3 shards"):
        SequentialSource(shards, READING, 5).__getitems__([0, 1])


class Watching(TarShards):
    opened = 0

    def items(self, shard):
        self.opened += 1
        yield from super().items(shard)


def test_nothing_is_read_ahead_of_need(tmp_path):
    write_shards(tmp_path, shards=30, each=5)
    shards = Watching(*list_shards(str(tmp_path), "data.root"), 2**20)
    source = StreamSource(shards, READING, epoch_size=150, images=5, lanes=1, buffer=6)
    assert shards.opened == 0
    source.__getitems__([0, 1, 2, 3, 4])
    assert shards.opened <= 3
    for batch in list(StreamBatches(150, 5, 0, 1))[1:]:
        source.__getitems__(batch)
    assert shards.opened == 30  # once each


def evaluated(folder, rank=0, world=1, **options):
    data = WebDatasetData(root="unused", val_root=str(folder), image_size=4, **{"num_workers": 0, "eval_batch_size": 3, **options})
    data._rank = lambda: (rank, world)
    return list(data.val_dataloader()), data


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:unreadable")
def test_evaluation_takes_the_first_images_once_over_all_ranks(tmp_path, workers):
    write_shards(tmp_path, broken=(2, 17))
    ranks = [evaluated(tmp_path, rank, 2, eval_size=20, num_workers=workers)[0] for rank in range(2)]
    assert [len(rank) for rank in ranks] == [4, 4]
    assert sorted(itertools.chain(*map(numbers, ranks))) == [n for n in range(20) if n not in (2, 17)]


def test_fewer_evaluation_images_than_asked_for_come_again_with_their_ids(tmp_path):
    write_shards(tmp_path, shards=1, each=7)
    with pytest.warns(UserWarning, match="7 images, fewer than data.init_args.eval_size=12"):
        batches, _ = evaluated(tmp_path, eval_size=12)
    assert numbers(batches) == [*range(7), *range(5)]
    assert len({i for batch in batches for i in batch["id"].tolist()}) == 7


def test_lanes_that_do_not_divide_are_refused(tmp_path):
    write_shards(tmp_path)
    data = WebDatasetData(root=str(tmp_path), val_share=0, test_share=0, batch_size=8, lanes=3)
    with pytest.raises(ValueError, match=r"data\.init_args\.lanes=3 must divide the 8 images"):
        data.train_dataloader()


def test_shards_are_split_whole(tmp_path):
    write_shards(tmp_path, shards=40, each=1)
    data = WebDatasetData(root=str(tmp_path), val_share=0.3, test_share=0.0)
    train, val = set(data.source("train").shards.names), set(data.source("val").shards.names)
    assert not train & val
    assert len(train | val) == 40
    assert 3 < len(val) < 25
    assert data.source("test") is None
    with pytest.raises(ValueError, match=r"40 shards .* val split.* set data\.init_args\.val_root"):
        WebDatasetData(root=str(tmp_path), val_share=1e-9).source("val")


def step_on_two(rank, folder):
    """Rank 1 has one readable image; both step through the same number of batches, joined by collectives."""
    module = Trivial()
    options = {"image_size": 4, "val_share": 0.0, "test_share": 0.0, "num_workers": 0}
    data = WebDatasetData(root=f"{folder}/rank{rank}", epoch_size=12, batch_size=2, **options)
    run = trainer(folder, devices=2, strategy="ddp", enable_checkpointing=False)
    run.fit(module, data)
    return [step[:2] for step in module.seen], dict(data.skipped), run.log_dir


@pytest.mark.slow
def test_a_rank_with_broken_data_steps_with_the_other(tmp_path):
    write_shards(tmp_path / "rank0", shards=2, each=6)
    write_shards(tmp_path / "rank1", shards=2, each=6, broken=range(11))
    (first, none, folder), (second, some, _) = run_on_two(step_on_two, str(tmp_path), timeout=200)
    assert first == second
    assert len(first) == 3 * 3 * 2
    assert not none
    assert len(some) == 11
    assert not (tmp_path / "skipped.rank0.jsonl").exists()
    assert len((tmp_path / "skipped.rank1.jsonl").read_text().splitlines()) == 11
    assert folder == str(tmp_path)


def test_an_image_without_caption_makes_a_batch_without_captions(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(4):
            add(archive, f"{number}.png", picture(number))
    assert "caption" not in next(iter(loader(tmp_path)))


def test_two_workers_open_every_shard_once_together(tmp_path):
    write_shards(tmp_path, shards=8, each=5)
    opened = 0
    for worker in range(2):  # as a DataLoader deals batches out
        shards = Watching(*list_shards(str(tmp_path), "data.root"), 2**20)
        source = StreamSource(shards, READING, epoch_size=40, images=5, lanes=1, readers=2, buffer=1)
        for batch in list(StreamBatches(40, 5, 0, 1))[worker::2]:
            source.__getitems__(batch)
        opened += shards.opened
    assert opened == 8
