"""All that is found is used or skipped with a reason: in folders, archives and tables, whatever names are in them."""

import io
import json
import os
import random
import tarfile
import warnings
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from tests.data.archives import add, picture
from tests.data.test_sampler import Trivial, trainer
from uae.data import ImageFolderData, TableData, WebDatasetData
from uae.data.folder import find_images
from uae.files.folders import CIRCLE, FOREIGN, HIDDEN, SPECIAL, list_files, shown
from uae.files.pictures import read_picture

CASES = int(os.environ.get("UAE_NAME_CASES", "300"))  # archives, folders and tables; each has a few names
OPTIONS = {"image_size": 4, "batch_size": 1, "val_share": 0.0, "test_share": 0.0, "num_workers": 0}


def png(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(file, "PNG")


@pytest.fixture
def folder(tmp_path):
    """Three images, and one file for every reason to skip it."""
    root = tmp_path / "images"
    for name in ("a.PNG", "sub/b.Jpeg", "photo.1.png", ".cache/c.png", "sub/._b.png", "__MACOSX/d.png"):
        png(root / name)
    (root / "a.TXT").write_text("a caption, which is no image and does not count")
    (root / "notes.txt").write_text("beside no image")
    (root / "e.heic").write_bytes(b"x")
    (root / "nothing.png").symlink_to("nowhere.png")
    (root / "self.png").symlink_to("self.png")
    (root / "sub" / "up").symlink_to(root)
    (root / "above").symlink_to(tmp_path.parent)
    png(tmp_path / "elsewhere" / "f.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "linked.again").symlink_to(tmp_path / "elsewhere")
    (root / "folder.png").mkdir()
    return root


def test_a_folder_with_all_that_may_be_in_one(folder):
    found = find_images(folder, "data.root")
    assert found.names == ["a.PNG", "linked/f.png", "photo.1.png", "sub/b.Jpeg"]
    assert found.skipped == {
        ".cache/c.png": HIDDEN, "sub/._b.png": HIDDEN, "__MACOSX/d.png": HIDDEN, "notes.txt": FOREIGN, "e.heic": FOREIGN,
        "nothing.png": SPECIAL, "self.png": SPECIAL, "sub/up": CIRCLE, "above": CIRCLE, "linked.again": CIRCLE,
    }  # fmt: skip


class Looking(Trivial):
    """Does nothing with images."""

    def validation_step(self, batch, batch_idx):
        pass

    test_step = predict_step = validation_step


@pytest.mark.filterwarnings("ignore")
def test_every_run_begins_with_one_line_and_names_what_is_skipped(folder, tmp_path, capsys):
    for stage in ("fit", "validate", "test", "predict"):
        logs = tmp_path / stage
        run = trainer(logs, enable_checkpointing=False, limit_val_batches=0 if stage == "fit" else 1)
        roots = {"val_root": str(folder), "test_root": str(folder), "predict_root": str(folder)}
        getattr(run, stage)(Looking(), ImageFolderData(str(folder), **OPTIONS, **roots))
        name = {"fit": "train", "validate": "val"}.get(stage, stage)
        (line,) = [line for line in capsys.readouterr().out.split("\n") if line.startswith("data of ")]
        expected = f"data of {name}: 14 files found, 4 used, 10 skipped (3 {HIDDEN}, 3 {CIRCLE}, 2 {FOREIGN}, 2 {SPECIAL})"
        assert sorted(line) == sorted(expected)  # reasons of one number may come in any order
        rows = [json.loads(row) for row in (logs / "skipped.rank0.jsonl").read_text().split("\n") if row]
        assert {row["name"]: row["reason"] for row in rows} == find_images(folder, "data.root").skipped


def archive(file, *entries):
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as out:
        for name, *rest in entries:
            add(out, name, rest[0] if rest else picture(1), **(rest[1] if len(rest) > 1 else {}))


def read(module):
    """The names of all images of a prediction, its line at the end, and what was warned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [name for batch in module.predict_dataloader() for name in batch["name"]]
    return names, module.skipped.report()


def streamed(file, size):
    return WebDatasetData(root="unused", predict_root=str(file), eval_size=size, eval_batch_size=3, **OPTIONS)


def test_an_archive_with_all_that_may_be_in_one(tmp_path):
    link = {"type": tarfile.LNKTYPE, "linkname": "a.JPG"}
    archive(
        tmp_path / "0.tar",
        ("a.JPG",), ("a.TXT", b"capitals"), ("a.seg.png",), ("a.png",), ("a.json", b"{}"),
        ("photo.0.png",), ("photo.0.txt", b"zero"), ("photo.1.png",), ("photo.txt", b"both"),
        ("._a.jpg",), (".cache/b.png",), ("__MACOSX/c.png",), ("orphan.json", b"{}"), ("./a.JPG",), ("copy.jpg", b"", link),
        ("\udcff.png",), ("\udcfe.png",), ("empty.png", b""), ("folder.png", b"", {"type": tarfile.DIRTYPE}), ("A.jpg",),
    )  # fmt: skip
    module = streamed(tmp_path / "0.tar", 7)
    names, said = read(module)
    assert names == [f"0.tar/{name}" for name in ("a.JPG", "photo.0.png", "photo.1.png", "\ufffdFF.png", "\ufffdFE.png", "A.jpg")]
    assert list(module.skipped) == ["0.tar/empty.png"]
    assert "15 images and other members found, 6 used, 9 skipped (3 hidden, 2 another picture of the same sample, " in said
    assert all(f"1 {reason}" in said for reason in ("no image, and beside none", "a second member", "a link", "unreadable"))
    items = module.source("predict").shards.items(0)
    captions = {item.name: item.caption for item in items if isinstance(item.content, bytes)}
    assert [captions[f"0.tar/{name}"] for name in ("a.JPG", "photo.0.png", "photo.1.png")] == ["capitals", "zero", "both"]


def test_names_that_share_their_beginning_fill_no_memory(tmp_path):
    archive(tmp_path / "0.tar", *((f"www.{number}.png",) for number in range(40)))
    names, _ = read(streamed(tmp_path / "0.tar", 40))
    assert len(set(names)) == 40


def test_folders_of_shards_and_of_tables_say_what_else_is_in_them(tmp_path):
    for name in ("0.tar", "1.TAR", "._0.tar", "2.tgz", "sub/3.tar"):
        (tmp_path / "s [1]" / name).parent.mkdir(parents=True, exist_ok=True)
        archive(tmp_path / "s [1]" / name, ("a.png",))
    shards = tmp_path / "s [1]"
    for root, line in ((shards, "5 files found, 2 used, 3 skipped"), (shards / "*.tar", "2 files found, 1 used, 1 skipped")):
        (tally,) = WebDatasetData(root=str(root), **OPTIONS).source("train").tallies
        assert str(tally).startswith(line)
    table = pyarrow.table({"image": [picture(1), None]})
    for name in ("t/0.parquet", "t/1.PARQUET", "t/._0.parquet", "t/.ipynb_checkpoints/0.parquet", "t/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"AppleDouble")
    for name in ("t/0.parquet", "t/1.PARQUET"):
        pyarrow.parquet.write_table(table, tmp_path / name)
    files, rows = TableData(root=str(tmp_path / "t"), **OPTIONS).source("train").tallies
    assert str(files) == f"5 files found, 2 used, 3 skipped (2 {HIDDEN}, 1 {FOREIGN})"
    assert str(rows) == "4 rows found, 4 used, 0 skipped"
    files, _ = TableData(root=str(tmp_path / "t" / "*.parquet"), **OPTIONS).source("train").tallies
    assert str(files) == f"2 files found, 1 used, 1 skipped (1 {HIDDEN})"


PARTS = [
    "a", "A", "b.c", "photo.0", ".x", "..x", "__MACOSX", "é", "e\u0301", "\udcff", "\udcfe\udcfd", " ", "\u2028", "n" * 120,
    "x\ny", "*", "[1]", "{0..1}", "%FF",
]  # fmt: skip
SUFFIXES = [".png", ".PNG", ".Jpg", ".seg.png", ".txt", ".TXT", ".json", "", ".", ".png.txt", ".parquet", ".tar"]


def drawn_name(draws):
    parts = [draws.choice(PARTS) for _ in range(draws.choice((1, 1, 1, 2, 3)))]
    return "/".join(parts) + draws.choice(SUFFIXES)


def check_folder(root, draws):
    files = set()
    for _ in range(draws.randint(1, 6)):
        name = drawn_name(draws)
        try:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            if (root / name).parent.resolve() != root.resolve() / Path(name).parent:
                continue  # behind a link, so that the file has another name
            if draws.random() < 0.15:
                (root / name).symlink_to(draws.choice((root, root / "a", root.parent, "nothing")))
            else:
                (root / name).write_bytes(picture(1))
        except OSError:  # a name is taken by a folder or a file, or not allowed
            continue
        files.add(name)
    found = list_files(root, "root", {".png", ".jpg"})
    assert not set(found.names) & set(found.skipped)
    assert files <= {*found.names, *found.skipped}  # nothing is lost; links may add what lies behind them
    for name in found.names:
        read_picture(root / name)
        shown(name).encode()


def check_archive(root, draws):
    entries = []
    for _ in range(draws.randint(1, 9)):
        fields = {"type": draws.choice((tarfile.SYMTYPE, tarfile.LNKTYPE))} if draws.random() < 0.1 else {}
        entries.append((drawn_name(draws), b"" if fields else picture(len(entries)), fields))
    file = root / "0.tar"
    archive(file, *entries)
    shards = streamed(file, 1).source("predict").shards
    items = list(shards.items(0))
    used = [item for item in items if isinstance(item.content, bytes)]
    belong = [name for name, *_ in entries if not name.lower().endswith((".png", ".jpg"))]
    assert len(items) <= len(entries) <= len(items) + len(belong)  # only what is no picture may belong to one
    assert len({item.name for item in used}) == len(used)
    for item in used:
        read_picture(item.content)
        item.name.encode()


def check_table(root, draws):
    names = {drawn_name(draws).removesuffix(".parquet") + draws.choice((".parquet", ".PARQUET")) for _ in range(3)}
    for name in names:
        out, rows = io.BytesIO(), [draws.choice((picture(1), None, b"")) for _ in range(3)]
        texts = [draws.choice((None, "x", " ")) for _ in range(4)]
        pyarrow.parquet.write_table(pyarrow.table({"image": [*rows, picture(2)], "text": texts}), out)
        try:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(out.getvalue())
        except OSError:
            continue
    files = list_files(root, "root", {".parquet"})
    if not files.names:
        return
    module = TableData(root="unused", predict_root=str(root), eval_batch_size=4, **OPTIONS)
    (of_files, of_rows), (images, _) = module.source("predict").tallies, read(module)
    assert (of_files.used, of_files.found) == (len(files.names), len(files.names) + len(files.skipped))
    names = set(images)  # another image stands in for a batch without any
    assert of_rows.found == 4 * of_files.used == len(names) + len(module.skipped)


@pytest.mark.parametrize("check", [check_folder, check_archive, check_table])
def test_names_of_every_kind(tmp_path, check):
    for case in range(CASES):
        root = tmp_path / f"{case}"
        root.mkdir()
        try:
            check(root, random.Random(case))
        except Exception as error:
            raise AssertionError(f"case {case}: {type(error).__name__}: {error}") from error
