import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from uae.data import ImageFolderData
from uae.data.folder import list_images
from uae.data.source import split_of
from uae.files.pictures import Reading

LIMIT = 10**6


def test_names_are_found_below_the_folder_but_not_in_hidden_places(tmp_path):
    for name in ("b.PNG", "a/c.jpg", "a/d/e.webp", "a/notes.txt", ".cache/f.png", "a/._g.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list_images(tmp_path, "data.root") == ["a/c.jpg", "a/d/e.webp", "b.PNG"]


@pytest.mark.parametrize("key", ["root", "val_root", "predict_root"])
def test_missing_and_empty_folders_name_the_key(tmp_path, key):
    (tmp_path / "x.txt").touch()
    stage = {"root": "train", "val_root": "val", "predict_root": "predict"}[key]
    for folder in (tmp_path / "absent", tmp_path):
        data = ImageFolderData(**{"root": str(tmp_path), key: str(folder)})
        with pytest.raises(FileNotFoundError, match=rf"data\.init_args\.{key}"):
            data.source(stage)


def saved(tmp_path, image, name="x.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def gray(value):
    return torch.full((3, 4, 4), value)


def test_modes_become_rgb(tmp_path):
    def read(image, name="x.png", **options):
        return Reading(4, "squash", LIMIT)(saved(tmp_path, image, name, **options))

    half = np.full((4, 4), 32896, dtype=np.uint16)  # 128 * 257: the 16-bit twin of 128
    torch.testing.assert_close(read(Image.fromarray(half)), gray(128 / 255))
    torch.testing.assert_close(read(Image.new("L", (4, 4), 51)), gray(0.2))
    torch.testing.assert_close(read(Image.new("1", (4, 4), 1)), gray(1.0))
    torch.testing.assert_close(read(Image.new("F", (4, 4), 0.2), "x.tif"), gray(0.2))
    torch.testing.assert_close(read(Image.new("CMYK", (4, 4), (0, 0, 0, 51)), "x.tif"), gray(0.8))
    torch.testing.assert_close(read(Image.new("LA", (4, 4), (0, 51))), gray(0.8))
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 4, 4)
    pink = torch.tensor([1.0, 0.8, 0.8]).view(3, 1, 1).expand(3, 4, 4)
    torch.testing.assert_close(read(Image.new("RGBA", (4, 4), (255, 0, 0, 51))), pink)  # a fifth of red over white
    torch.testing.assert_close(read(Image.new("RGB", (4, 4), "red").convert("P")), red)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 0, 0])
    torch.testing.assert_close(read(palette, transparency=0), gray(1.0))
    torch.testing.assert_close(read(palette, transparency=1), red)
    torch.testing.assert_close(read(palette, "x.gif"), red)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (4, 4), "black")
    image.paste("white", (0, 0, 4, 2))  # the stored top is white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: the top comes to the right
    seen = Reading(4, "squash", LIMIT)(saved(tmp_path, image, exif=exif))
    assert torch.equal(seen[0], torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(4, 4))


def test_fits(tmp_path):
    image = Image.new("RGB", (12, 4), "black")
    image.paste("red", (4, 0, 8, 4))  # black, red, black; 4 pixels each
    file = saved(tmp_path, image)
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    assert torch.equal(Reading(4, "crop", LIMIT)(file), red.expand(3, 4, 4))
    padded = Reading(12, "pad", LIMIT)(file)
    assert torch.equal(padded[:, :4], torch.ones(3, 4, 12))
    assert torch.equal(padded[:, 8:], torch.ones(3, 4, 12))
    assert torch.equal(padded[:, 4:8, 4:8], red.expand(3, 4, 4))
    squashed = Reading(12, "squash", LIMIT)(file)
    assert torch.equal(squashed[:, :, 6:7], red.expand(3, 12, 1))
    assert squashed[:, :, 0].max() == 0
    line = saved(tmp_path, Image.new("RGB", (900, 1), "red"), "line.png")
    for fit in ("crop", "pad", "squash"):
        assert Reading(4, fit, LIMIT)(line).shape == (3, 4, 4)


@pytest.fixture
def folder(tmp_path):
    """Forty good files, four bad ones."""
    for i in range(40):
        Image.new("RGB", (5 + i, 9), (i, 0, 0)).save(tmp_path / f"{i:02}.png")
    whole = (tmp_path / "30.png").read_bytes()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "truncated.jpg")
    (tmp_path / "truncated.jpg").write_bytes((tmp_path / "truncated.jpg").read_bytes()[:700])
    (tmp_path / "noimage.png").write_bytes(b"not an image")
    for name, side in (("big.png", 12_000), ("bomb.png", 40_000)):  # a header that promises more than there is
        header = whole[12:16] + struct.pack(">II", side, side) + whole[24:29]
        (tmp_path / name).write_bytes(whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:])
    return tmp_path


BAD = {"truncated.jpg", "noimage.png", "big.png", "bomb.png"}


def module(folder, **options):
    return ImageFolderData(str(folder), image_size=8, **{"num_workers": 0, "val_share": 0.0, "test_share": 0.0, **options})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_training_images_are_replaced_and_named_once(folder, num_workers):
    data = module(folder, batch_size=4, num_workers=num_workers)
    loader = data.train_dataloader()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            batches = list(loader)
            assert [batch["image"].shape for batch in batches] == [(4, 3, 8, 8)] * 11
            for batch in batches:
                values = [int(name[:2]) for name in batch["name"]]  # a replacement keeps name, id and pixels together
                torch.testing.assert_close(batch["image"].amax((1, 2, 3)) * 255, torch.tensor(values).float())
    assert len({i for batch in batches for i in batch["id"].tolist()}) >= 37
    named = [str(warning.message) for warning in caught if "unreadable" in str(warning.message)]
    assert len(named) == len(data.skipped) == 4
    assert all(sum(name in message for message in named) == 1 for name in data.skipped)
    assert set(data.skipped) == BAD


@pytest.mark.filterwarnings("ignore:unreadable")
def test_evaluation_leaves_unreadable_images_out(folder):
    data = module(folder, predict_root=str(folder), eval_batch_size=8)
    names = [name for batch in data.predict_dataloader() for name in batch["name"]]
    assert names == [f"{i:02}.png" for i in range(40)]
    assert set(data.skipped) == BAD
    assert "max_pixels" in data.skipped["big.png"]
    assert "DecompressionBomb" in data.skipped["bomb.png"]
    single = module(folder, predict_root=str(folder), eval_batch_size=1)
    assert len(list(single.predict_dataloader())) == 44  # no batch is empty: the ranks step together


@pytest.mark.filterwarnings("ignore:unreadable")
def test_the_limit_of_pixels(folder):
    data = module(folder, predict_root=str(folder), max_pixels=9 * 20, eval_batch_size=44)
    names = [name for batch in data.predict_dataloader() for name in batch["name"]]
    assert names == [f"{i:02}.png" for i in range(16)]  # 5 + i <= 20
    assert "max_pixels=180" in data.skipped["39.png"]


def test_nothing_readable_is_an_error(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="no image of these 1 is readable; x.png: none of BMP, GIF"):
        list(module(tmp_path, batch_size=1).train_dataloader())


def test_splits_are_disjoint_stable_and_of_the_asked_size(tmp_path):
    names = [f"{i}.png" for i in range(4000)]
    share = {stage: [name for name in names if split_of(name, 0.1, 0.2) == stage] for stage in ("train", "val", "test")}
    assert sum(map(len, share.values())) == 4000
    assert abs(len(share["val"]) - 400) < 80
    assert abs(len(share["test"]) - 800) < 110
    assert all(split_of(name, 0.1, 0.0) == "train" for name in share["train"])  # a smaller share moves nothing into others


@pytest.mark.filterwarnings("ignore:unreadable")
def test_roles_have_their_own_ids_which_other_files_do_not_change(folder):
    data = module(folder, val_root=str(folder), test_share=0.5, eval_batch_size=64)
    val, test = next(iter(data.val_dataloader())), next(iter(data.test_dataloader()))
    assert not set(val["id"].tolist()) & set(test["id"].tolist())  # the same names, other folders
    assert val["id"].max() < 2**48
    before = dict(zip(test["name"], test["id"].tolist(), strict=True))
    (folder / "00.png").unlink()
    (folder / "aa.png").write_bytes((folder / "01.png").read_bytes())
    test = next(iter(module(folder, test_share=0.5, eval_batch_size=64).test_dataloader()))
    after = dict(zip(test["name"], test["id"].tolist(), strict=True))
    assert {name: after[name] for name in before.keys() & after.keys()} == {n: before[n] for n in before.keys() & after}
    assert len(before.keys() & after.keys()) >= len(before) - 1


def test_an_empty_split_says_what_to_change(folder):
    with pytest.raises(ValueError, match=r"data\.init_args\.val_share=1e-09.*data\.init_args\.val_root"):
        module(folder, val_share=1e-9).val_dataloader()
    assert module(folder).val_dataloader() == []
