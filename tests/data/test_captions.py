"""Captions beside images: where they are found, that they stay with their image, and what is said where they are missing."""

import json
import re
import tarfile
import warnings

import datasets
import pyarrow
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from pyarrow import parquet

from tests.data.archives import add
from tests.data.archives import picture as pixels
from uae.data import ImageFolderData, TableData, WebDatasetData
from uae.data.captions import CaptionFiles, UnreadableCaptionError
from uae.data.folder import FolderSource, list_images
from uae.data.sampler import ImageLoader, TrainBatches
from uae.data.source import NO_CAPTION, id_of
from uae.files.pictures import Reading
from uae.miniature.data import SceneData
from uae.miniature.scenes import describe


def picture(folder, name):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(file)
    return file


def metadata(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")


@pytest.fixture
def photographs(tmp_path):
    """Twenty images, each called in its caption."""
    for number in range(20):
        picture(tmp_path, f"{number}.png").with_suffix(".txt").write_text(f"photograph {number}")
    return tmp_path


def test_where_captions_are_found(tmp_path):
    metadata(tmp_path, [
        {"file_name": "a.png", "text": " from the top  "},
        {"file_name": "sub/b.png", "text": "from the top"},
        {"file_name": "sub/c.png", "text": "from the top"},
        {"file_name": "sub/deep/d.png", "text": "naïve, “quoted”"},
        {"file_name": "e.png", "label": 3},
        {"file_name": "./f.png", "text": "dotted"},
        {"file_name": "g.png", "text": "  "},
    ])  # fmt: skip
    metadata(tmp_path / "sub", [{"file_name": "b.png", "text": "from the folder"}])
    (tmp_path / "sub" / "c.txt").write_text("﻿from its own file\n", encoding="utf-8")
    (tmp_path / "h.txt").write_text("\n")
    captions = CaptionFiles(tmp_path)
    expected = {
        "a.png": "from the top",
        "sub/b.png": "from the folder",
        "sub/c.png": "from its own file",
        "sub/c.jpeg": "from its own file",
        "sub/deep/d.png": "naïve, “quoted”",
        "e.png": None,
        "f.png": "dotted",
        "g.png": None,
        "h.png": None,
        "absent.png": None,
    }
    assert {name: captions[name] for name in expected} == expected


@pytest.mark.parametrize("line", ["{", '"a.png"', '{"text": "no name"}', '{"file_name": 3, "text": "x"}', "[]", "[" * 99999])
def test_a_broken_line_is_named_and_costs_no_other_caption(tmp_path, line):
    good = [json.dumps({"file_name": name, "text": text}) for name, text in (("a.png", "x"), ("b.png", "y"))]
    (tmp_path / "metadata.jsonl").write_text("\n".join([good[0], "", line, good[1], ""]))
    captions = CaptionFiles(tmp_path, "data.val_root")
    assert (captions["a.png"], captions["b.png"]) == ("x", "y")
    assert isinstance(captions["c.png"], UnreadableCaptionError)
    assert re.search(r"metadata\.jsonl, line 3 is no JSON object .*data\.val_root", str(captions["c.png"]))
    assert "\n" not in str(captions["c.png"])


def test_a_batch_has_captions_if_all_of_its_images_have(photographs):
    picture(photographs, "bare.png")
    names = list_images(photographs, "data.root")
    source = FolderSource(str(photographs), names, Reading(4, "squash", 100), captions=CaptionFiles(photographs))
    captioned = [place for place, name in enumerate(names) if name != "bare.png"]
    batch, _ = source.__getitems__(captioned[5:9])
    assert batch["caption"] == [f"photograph {name.removesuffix('.png')}" for name in batch["name"]]
    batch, _ = source.__getitems__([names.index("bare.png"), captioned[0]])
    assert "caption" not in batch
    assert source.without_caption() == {"bare.png": NO_CAPTION}


def test_captions_stay_with_their_images_where_files_cannot_be_read(photographs):
    (photographs / "3.png").write_bytes(b"no image")
    source = ImageFolderData(str(photographs), 4, val_share=0, test_share=0).source("train")
    batch, failures = source.__getitems__(list(range(20)))
    assert list(failures) == ["3.png"]
    assert len(batch["name"]) == 20  # another stands in
    assert batch["caption"] == [f"photograph {name.removesuffix('.png')}" for name in batch["name"]]


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_ranks_and_resumed_runs_keep_them(photographs, workers):
    def loader(rank):
        source = ImageFolderData(str(photographs), 4, val_share=0, test_share=0).source("train")
        return ImageLoader(source, TrainBatches(20, 5, rank, 2), repeats=2, num_workers=workers)

    seen = []
    for rank in (0, 1):
        batches = list(loader(rank))
        resumed = loader(rank)
        resumed.load_state_dict({"epoch": 0, "position": 3, "images": 10, "repeats": 2})
        (last,) = list(resumed)
        assert last["caption"] == batches[3]["caption"]
        for batch in batches:
            assert batch["caption"] == [f"photograph {name.removesuffix('.png')}" for name in batch["name"]]
            assert [id_of(name) for name in batch["name"]] == batch["id"].tolist()
        seen += [caption for batch in batches[::2] for caption in batch["caption"]]
    assert sorted(seen) == sorted(f"photograph {number}" for number in range(20))


def test_captions_reach_the_module(photographs):
    data = ImageFolderData(str(photographs), 4, batch_size=4, val_share=0, test_share=0, num_workers=0)
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    batch = next(iter(data.train_dataloader()))
    moved = data.transfer_batch_to_device(batch, batch["image"].device, 0)
    assert moved["caption"] == batch["caption"] != []


def test_where_captions_are_needed_images_without_are_left_out_with_their_reasons(photographs, tmp_path_factory):
    def data(**options):
        module = ImageFolderData(str(photographs), 4, **{"val_share": 0, "test_share": 0, **options})
        module.captions = "needed"
        return module

    for number in range(3):
        (photographs / f"{number}.txt").unlink()
    (photographs / "3.txt").write_bytes(b"caf\xe9")
    source = data().source("train")
    assert len(source) == 16
    (tally,) = source.tallies
    assert str(tally) == "20 files found, 16 used, 4 skipped (4 without a caption)"
    assert {name: tally.names[name] for name in ("0.png", "1.png", "2.png")} == dict.fromkeys(("0.png", "1.png", "2.png"), NO_CAPTION)
    assert "3.txt is no UTF-8" in tally.names["3.png"]
    other = tmp_path_factory.mktemp("val")
    picture(other, "v.png")
    with pytest.raises(ValueError, match=r"^1 of 1 val images .*\(v\.png\).*data\.init_args\.val_root$"):
        data(val_root=str(other)).source("val")


def test_what_is_wrong_with_a_caption_costs_no_image_where_captions_are_not_needed(photographs):
    (photographs / "3.txt").write_bytes(b"caf\xe9")
    (photographs / "4.txt").unlink()
    (photographs / "metadata.jsonl").write_text('{"image": "0.png", "caption": "of another program"}')
    for captions in ("welcome", "unread"):
        data = ImageFolderData(str(photographs), 4, val_share=0, test_share=0)
        data.captions = captions
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            batch, failures = data.source("train").__getitems__(list(range(20)))
        assert (len(batch["name"]), failures) == (20, {})
        assert "caption" not in batch
        assert [word for one in caught for word in ("3.txt", "metadata.jsonl") if word in str(one.message)] == (
            ["3.txt", "metadata.jsonl"] if captions == "welcome" else []
        )


def test_text_files_of_any_capitals_and_encodings_with_a_mark(tmp_path):
    for name in ("a.TXT", "b.Txt", "photo.0.txt", "photo.1.txt"):
        (tmp_path / name).write_text(name, encoding="utf-16")
    (tmp_path / "c.TXT").write_text("upper")
    (tmp_path / "c.txt").write_text("lower")
    captions = CaptionFiles(tmp_path)
    found = [captions[name] for name in ("a.png", "b.png", "photo.0.png", "photo.1.png", "c.png", "photo.png")]
    assert found == ["a.TXT", "b.Txt", "photo.0.txt", "photo.1.txt", "lower", None]


def test_scenes_come_with_a_detailed_caption():
    batch, _ = SceneData().source("train").__getitems__([0, 5, 9])
    assert batch["caption"] == [describe(scene) for scene in batch["scene"]]


TEXTS = ["a", None, "c", "  ", "e", "f"]
FIVE = {"image_size": 4, "batch_size": 4, "num_workers": 0, "val_share": 0.0, "test_share": 0.0, "epoch_size": 8}


def tabled(folder, kind, texts):
    images = [pixels(number) for number in range(6)]
    if kind == "tar":
        with tarfile.open(folder / "0.tar", "w") as out:
            for number, text in enumerate(texts):
                add(out, f"{number}.png", images[number])
                add(out, f"{number}.TXT", (text or "").encode())
        return WebDatasetData(root=str(folder / "0.tar"), **FIVE)
    if kind == "saved":
        datasets.Dataset.from_dict({"image": images, "text": texts}).save_to_disk(str(folder / "saved"))
        return TableData(root=str(folder / "saved"), caption_column="text", **FIVE)
    parquet.write_table(pyarrow.table({"image": images, "text": pyarrow.array(texts, pyarrow.string())}), folder / "0.parquet")
    return TableData(root=str(folder / "0.parquet"), caption_column="text", streaming=kind == "streamed", **FIVE)


@pytest.mark.filterwarnings("ignore:unreadable")
@pytest.mark.parametrize("kind", ["tar", "saved", "parquet", "streamed"])
def test_where_captions_are_needed_no_batch_lacks_one_whatever_the_data_are(tmp_path, kind):
    data = tabled(tmp_path, kind, TEXTS)
    data.captions = "needed"
    batches = list(data.train_dataloader())
    assert {caption for batch in batches for caption in batch["caption"]} <= {"a", "c", "e", "f"}
    assert all(len(batch["caption"]) == len(batch["name"]) == 4 for batch in batches)
    if kind in ("saved", "parquet"):
        assert "6 rows found, 4 used, 2 skipped (2 without a caption)" in map(str, data.source("train").tallies)
    else:
        assert list(data.skipped.values()) == [NO_CAPTION] * 2


@pytest.mark.parametrize("kind", ["tar", "saved", "parquet", "streamed"])
def test_no_caption_at_all_is_an_error_before_the_first_step(tmp_path, kind):
    data = tabled(tmp_path, kind, [None] * 6)
    data.captions = "needed"
    with pytest.raises(ValueError, match=r"no image of the 1 shards .* it has no caption|6 of 6 train images have no caption"):
        next(iter(data.train_dataloader()))


class Reads(torch.nn.Module):
    needs_captions = True

    def update(self, texts, reconstructions_NCHW, batch):
        self.seen = batch["caption"]

    def compute(self):
        return {"read": len(self.seen)}

    def reset(self):
        pass


def test_captions_are_read_for_a_metric_that_needs_them_and_for_no_other(photographs, build, trainer):
    for number in range(5):
        (photographs / f"{number}.txt").unlink()
    for metrics, images in (({"reads": Reads()}, 15), ({}, 20)):
        options = {"num_workers": 0, "eval_batch_size": 20, "val_root": str(photographs)}
        module, data = build(metrics=metrics), ImageFolderData(str(photographs), 24, **options)
        trainer(limit_val_batches=1.0).validate(module, data, verbose=False)
        assert len(data.source("val")) == images
        (batch,) = list(data.val_dataloader())
        assert ("caption" in batch) == bool(metrics)
        trainer().predict(module, ImageFolderData(str(photographs), 24, num_workers=0, predict_root=str(photographs)))
