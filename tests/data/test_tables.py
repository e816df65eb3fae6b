"""Parquet files and Hugging Face data sets: rows by number, from front to back, and what is wrong with them."""

import pickle
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from tests.data.archives import numbers_of, picture
from uae.data import TableData
from uae.data.source import id_of
from uae.data.tables import Columns, ParquetTable, content_of
from uae.files.pictures import UnreadableImageError

PLAIN = {"image_size": 4, "batch_size": 4, "num_workers": 0, "val_share": 0.0, "test_share": 0.0}


def write_table(file, numbers, form="struct", group=5, missing=()):
    """One row per number; missing ones are null."""
    kinds = {"struct": {"bytes": pa.binary(), "path": pa.string()}, "bytes": pa.binary(), "path": pa.string()}
    kind = pa.struct(kinds[form]) if form == "struct" else kinds[form]
    values = []
    for number in numbers:
        value = {"struct": {"bytes": picture(number), "path": f"{number}.png"}, "bytes": picture(number), "path": f"i/{number}.png"}
        values.append(None if number in missing else value[form])
    columns = {"image": pa.array(values, kind), "text": [f"photograph {n}" for n in numbers], "other": list(numbers)}
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), file, row_group_size=group)


@pytest.fixture
def tables(tmp_path):
    """40 rows in two files, row groups of five and one of four."""
    write_table(tmp_path / "t" / "a.parquet", range(19))
    write_table(tmp_path / "t" / "sub" / "b.parquet", range(19, 40))
    return tmp_path / "t"


def data(root, **options):
    return TableData(root=str(root), **{**PLAIN, **options})


def epoch(module):
    return list(module.train_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_every_row_once_with_its_name_id_and_caption(tables, workers):
    batches = epoch(data(tables, caption_column="text", num_workers=workers))
    seen = {}
    for batch in batches:
        for number, name, key, caption in zip(numbers_of(batch), batch["name"], batch["id"].tolist(), batch["caption"], strict=True):
            assert caption == f"photograph {number}"
            assert key == id_of(name)
            seen[number] = name
    assert seen == {n: f"a.parquet/{n}" if n < 19 else f"sub/b.parquet/{n - 19}" for n in range(40)}
    assert "caption" not in epoch(data(tables))[0]


@pytest.mark.parametrize("form", ["struct", "bytes", "path"])
def test_image_columns_of_every_kind(tmp_path, form):
    write_table(tmp_path / "a.parquet", range(8), form)
    for number in range(8):
        (tmp_path / "i").mkdir(exist_ok=True)
        (tmp_path / "i" / f"{number}.png").write_bytes(picture(number))
    assert sorted(n for batch in epoch(data(tmp_path)) for n in numbers_of(batch)) == list(range(8))


def test_files_patterns_and_folders_are_the_same_rows(tables):
    def rows(root):
        source = data(root).source("train")
        return [source.name(position) for position in range(len(source))]

    assert rows(tables / "a.parquet") == rows(tables / "*.parquet") == rows(tables)[:19]
    for root in (tables / "x*.parquet", tables / "absent.parquet"):
        with pytest.raises(FileNotFoundError, match=r"data\.init_args\.root"):
            rows(root)


def test_splits_share_no_row_and_roots_of_their_own_have_their_own_ids(tables):
    module = data(tables, val_share=0.3, test_share=0.2)
    parts = [{module.source(stage).name(i) for i in range(len(module.source(stage)))} for stage in ("train", "val", "test")]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 40
    own = data(tables, val_root=str(tables), eval_batch_size=64)
    (batch,) = list(own.val_dataloader())
    assert numbers_of(batch) == list(range(40))
    assert batch["id"].tolist() == [id_of(name, "val:") for name in batch["name"]]
    assert data(tables).source("test") is None


def test_reading_forward_decodes_a_row_group_once(tables, monkeypatch):
    table = ParquetTable(tables, ["a.parquet", "sub/b.parquet"], Columns("image"))
    opened = []
    inner = ParquetTable._open
    monkeypatch.setattr(ParquetTable, "_open", lambda self, group: opened.append(group) or inner(self, group))
    for row in range(40):
        table.item(row)
    assert opened == list(range(9))
    assert table.item(3).content == table.item(3).content == picture(3)


@pytest.mark.filterwarnings("ignore:unreadable")
def test_null_rows_are_skipped_and_named(tmp_path):
    write_table(tmp_path / "a.parquet", range(16), missing=(3, 4, 9))
    module = data(tmp_path)
    batches = epoch(module)
    assert [len(batch["name"]) for batch in batches] == [4] * 4
    assert set(module.skipped) == {"a.parquet/3", "a.parquet/4", "a.parquet/9"}
    assert "holds NoneType where an image should be" in module.skipped["a.parquet/3"]


@pytest.mark.filterwarnings("ignore:unreadable")
def test_a_corrupted_row_group_costs_its_rows_only(tmp_path):
    file = tmp_path / "a.parquet"
    write_table(file, range(16), "bytes", group=4)
    column = parquet.ParquetFile(file).metadata.row_group(1).column(0)
    content = bytearray(file.read_bytes())
    first = column.dictionary_page_offset or column.data_page_offset
    content[first : first + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    file.write_bytes(content)
    module = data(tmp_path)
    seen = {number for batch in epoch(module) for number in numbers_of(batch)}
    assert seen == {*range(4), *range(8, 16)}
    assert set(module.skipped) == {f"a.parquet/{row}" for row in range(4, 8)}


def test_broken_files_and_missing_columns_are_said_at_once(tables):
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'picture' but image, text, other: set .*image_column"):
        data(tables, image_column="picture").source("train")
    with pytest.raises(ValueError, match=r"no column 'words'.*caption_column"):
        data(tables, caption_column="words").source("train")
    module = data(tables)
    module.captions = "needed"
    with pytest.raises(ValueError, match="caption_column"):
        module.source("train")
    (tables / "c.parquet").write_bytes((tables / "a.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"c\.parquet is no whole Parquet file .* data\.init_args\.root"):
        data(tables).source("train")


@pytest.mark.parametrize("path", ["../x.png", "/etc/passwd", "a/../../x.png", "link/x.png"])
def test_paths_in_rows_do_not_leave_the_folder(tmp_path, path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "link").symlink_to(tmp_path)
    for value in (path, {"bytes": None, "path": path}):
        content = content_of(value, tmp_path / "d")
        assert isinstance(content, UnreadableImageError)
        assert "leaves the folder" in str(content)
    assert content_of("x.png", tmp_path / "d") == (tmp_path / "d" / "x.png").resolve()


def hugging_face(folder, count=20):
    rows = {"image": [{"bytes": picture(number), "path": None} for number in range(count)],
            "text": [[f"photograph {number}", "another"] for number in range(count)]}  # fmt: skip
    found = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": found, "validation": found.select(range(6))}).save_to_disk(str(folder))
    return folder


def test_saved_data_sets_are_read_by_split_without_decoding_by_the_library(tmp_path, monkeypatch):
    folder = hugging_face(tmp_path / "h")
    monkeypatch.setattr(datasets.Image, "decode_example", None)
    module = data(f"{folder}:train", val_root=f"{folder}:validation", caption_column="text")
    batches = epoch(module)
    assert sorted(n for batch in batches for n in numbers_of(batch)) == list(range(20))
    assert all(batch["caption"] == [f"photograph {n}" for n in numbers_of(batch)] for batch in batches)
    assert sorted(batches[0]["name"][0].split("/")) == sorted(["train", str(numbers_of(batches[0])[0])])
    (batch,) = list(module.val_dataloader())
    assert numbers_of(batch) == list(range(6))
    with pytest.raises(ValueError, match="no column 'picture' but image, text"):
        data(f"{folder}:train", image_column="picture").source("train")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streamed_table_has_full_batches_resumes_and_stays_in_step(tmp_path, workers):
    for part in range(3):
        write_table(tmp_path / f"{part}.parquet", range(part * 8, part * 8 + 8))
    options = {"streaming": True, "epoch_size": 24, "shuffle_buffer": 4, "num_workers": workers, "caption_column": "text"}

    def loader():
        return data(f"{tmp_path}/*.parquet", **options).train_dataloader()

    whole = [numbers_of(batch) for batch in loader()]
    assert [len(batch) for batch in whole] == [4] * 6
    if not workers:  # with two readers, one may come to its second pass before the other has ended its first
        assert sorted(n for batch in whole for n in batch) == list(range(24))
    resumed = loader()
    resumed.load_state_dict({"epoch": 0, "position": 4, "images": 4, "repeats": 1})
    assert [numbers_of(batch) for batch in resumed] == whole[4:]
    val = data("unused", val_root=f"{tmp_path}/*.parquet", eval_size=10, **options)
    assert sum(len(batch["name"]) for batch in val.val_dataloader()) == 10


def test_streaming_tables_are_known_by_file(tmp_path):
    write_table(tmp_path / "0.parquet", range(4))
    source = data(f"{tmp_path}/*.parquet", streaming=True, val_share=0.5).source("train")
    assert source.shards.name(0) == "train-00000"
    batch, *_ = source.__getitems__([0, 1, 2, 3])
    assert all(name.startswith("train-00000/") for name in batch["name"])
    assert data(f"{tmp_path}/*.parquet", streaming=True, val_share=0.5).source("val") is None


def test_a_folder_of_parquet_files_is_streamed_like_a_pattern(tables, tmp_path):
    folder, files = (data(root, streaming=True).source("train") for root in (tables, f"{tables}/*.parquet"))
    assert (len(files.shards), len(folder.shards)) == (1, 2)  # the pattern does not reach into sub
    images = [item.content for shard in range(2) for item in folder.shards.items(shard)]
    assert images == [data(tables).source("train").item(row).content for row in range(40)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"data\.init_args\.root=.*empty' holds no Parquet file"):
        data(tmp_path / "empty", streaming=True).source("train")


def test_sources_travel_to_workers(tables, tmp_path):
    for module in (data(tables), data(f"{tables}/a.parquet", streaming=True), data(f"{hugging_face(tmp_path / 'h')}:train")):
        copy = pickle.loads(pickle.dumps(module.source("train")))
        assert len(copy.__getitems__([0, 1])[0]["name"]) == 2


def test_without_the_extra_the_error_names_it(tables, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for options in ({}, {"streaming": True}):
        with pytest.raises(ImportError, match=r"uae\[data\]"):
            data(tables, **options).source("train")
