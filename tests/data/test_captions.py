"""Captions beside images: where they are found, that they stay with their image, and what is said where they are missing."""

import json

import pytest
from lightning.pytorch import Trainer
from PIL import Image

from uae.data import ImageFolderData
from uae.data.captions import CaptionFiles
from uae.data.folder import FolderSource, list_images
from uae.data.sampler import ImageLoader, TrainBatches
from uae.data.source import id_of
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


@pytest.mark.parametrize("line", ["{", '"a.png"', '{"text": "no name"}', '{"file_name": 3, "text": "x"}', "[]"])
def test_a_broken_line_is_named(tmp_path, line):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 3 is no JSON object .*data\.val_root") as error:
        CaptionFiles(tmp_path, "data.val_root")["a.png"]
    assert "\n" not in str(error.value)


def test_a_batch_has_captions_if_all_of_its_images_have(photographs):
    picture(photographs, "bare.png")
    names = list_images(photographs, "data.root")
    source = FolderSource(str(photographs), names, Reading(4, "squash", 100), captions=CaptionFiles(photographs))
    captioned = [place for place, name in enumerate(names) if name != "bare.png"]
    batch, _ = source.__getitems__(captioned[5:9])
    assert batch["caption"] == [f"photograph {name.removesuffix('.png')}" for name in batch["name"]]
    batch, _ = source.__getitems__([names.index("bare.png"), captioned[0]])
    assert "caption" not in batch
    assert source.without_caption() == ["bare.png"]


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


def test_missing_ones_are_counted_with_examples_and_the_key(photographs, tmp_path_factory):
    data = ImageFolderData(str(photographs), 4, val_share=0, test_share=0)
    data.check_captions()
    for number in range(4):
        (photographs / f"{number}.txt").unlink()
    assert data.source("train").without_caption() == [f"{number}.png" for number in range(4)]
    with pytest.raises(
        ValueError, match=r"^4 of 20 train images have no caption \(0\.png, 1\.png, 2\.png, \.\.\.\).*root$"
    ):
        data.check_captions()
    metadata(photographs, [{"file_name": f"{number}.png", "text": "x"} for number in range(4)])
    ImageFolderData(str(photographs), 4, val_share=0, test_share=0).check_captions()
    other = tmp_path_factory.mktemp("val")
    picture(other, "v.png")
    data = ImageFolderData(str(photographs), 4, test_share=0, val_root=str(other))
    with pytest.raises(ValueError, match=r"^1 of 1 val images .*\(v\.png\).*data\.init_args\.val_root$"):
        data.check_captions()


def test_scenes_come_with_a_detailed_caption():
    batch, _ = SceneData().source("train").__getitems__([0, 5, 9])
    assert batch["caption"] == [describe(scene) for scene in batch["scene"]]
    SceneData().check_captions()
