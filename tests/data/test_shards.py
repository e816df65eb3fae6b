"""Tar archives from anywhere: what is taken out of them, and what hostile ones do not get."""

import gzip
import io
import random
import tarfile
import tracemalloc

import pytest

from tests.data.archives import add, picture, write_shard, write_shards
from uae.data.shards import TarShards, expand, inside, list_shards, members
from uae.data.streaming import passable
from uae.files.pictures import UnreadableImageError

LIMIT = 2**20


def items(folder, name="a.tar", limit=LIMIT):
    return list(passable(TarShards(str(folder), [name], limit), 0, {}))


def archive_of(folder, *entries, mode="w", **options):
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "a.tar", mode, **options) as archive:
        for name, content, fields in entries:
            add(archive, name, content, **fields)
    return folder


def test_patterns_are_written_out_and_folders_listed(tmp_path):
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("{0..1}/{0..1}") == ["0/0", "0/1", "1/0", "1/1"]
    write_shards(tmp_path / "s", shards=3)
    (tmp_path / "s" / "notes.txt").touch()
    found = str(tmp_path / "s"), ["000.tar", "001.tar", "002.tar"]
    assert list_shards(str(tmp_path / "s"), "data.root") == found
    assert list_shards(f"{tmp_path}/s/*.tar", "data.root") == found
    assert list_shards(f"{tmp_path}/s/{{000..002}}.tar", "data.root") == found
    url = list_shards("https://nowhere.invalid/x/{0..9999}.tar", "data.root")  # nothing is asked of the network
    assert url[0] == "https://nowhere.invalid/x"
    assert len(url[1]) == 10_000
    (tmp_path / "empty").mkdir()
    for root in (f"{tmp_path}/empty", f"{tmp_path}/s/*.tgz", "", f"{tmp_path}/nowhere", f"{tmp_path}/nowhere.tar"):
        with pytest.raises(FileNotFoundError, match=r"data\.val_root="):
            list_shards(root, "data.val_root")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_gives_names_contents_and_captions(tmp_path, form):
    long = "d" * 150 + "/" + "n" * 90
    entries = [("a/1.png", picture(1), {}), ("a/1.txt", b"  one\n", {}), ("a/1.json", b"{}", {}), ("b/1.png", picture(2), {}),
               (f"{long}.jpg" if form != tarfile.USTAR_FORMAT else "n.jpg", picture(3), {}),
               ("naïve.seg.png", picture(4), {}), ("naïve.txt", "ü".encode(), {}), ("alone.txt", b"x", {})]  # fmt: skip
    archive_of(tmp_path / "t", *entries, format=form)
    found = items(tmp_path / "t")
    assert [item.content for item in found] == [picture(number) for number in (1, 2, 3, 4)]
    assert [item.caption for item in found] == ["one", None, None, "ü"]
    assert [item.name for item in found][:2] == ["a.tar/a/1.png", "a.tar/b/1.png"]
    if form != tarfile.USTAR_FORMAT:
        assert found[2].name == f"a.tar/{long}.jpg"
        assert found[3].name == "a.tar/naïve.seg.png"
    with tarfile.open(tmp_path / "t" / "a.tar") as archive:  # the same members as Python's own reader
        expected = [(member.name, member.size) for member in archive if member.isreg()]
    with (tmp_path / "t" / "a.tar").open("rb") as file:
        assert [(name, size) for name, size, _ in members(file)] == expected


def test_compressed_archives(tmp_path):
    write_shard(tmp_path / "a.tar.gz", range(5), mode="w:gz")
    assert [item.caption for item in items(tmp_path, "a.tar.gz")] == [f"photograph {number}" for number in range(5)]


@pytest.mark.parametrize(("given", "safe"), [
    ("/etc/x.png", "etc/x.png"), ("../../x.png", "x.png"), ("a/../../x.png", "a/x.png"), ("//net/x.png", "net/x.png"),
    ("..\\..\\x.png", "x.png"), ("./x.png", "x.png"), ("a\0b.png", "ab.png"), ("..", "image"), ("", "image"),
])  # fmt: skip
def test_names_stay_inside(given, safe):
    assert inside(given) == safe


def test_links_devices_and_names_lead_nowhere(tmp_path):
    (tmp_path / "secret.png").write_bytes(picture(99))
    special = {"linkname": "../secret.png"}
    entries = [
        ("1.png", b"", {"type": tarfile.SYMTYPE, **special}), ("2.png", b"", {"type": tarfile.LNKTYPE, **special}),
        ("3.png", b"", {"type": tarfile.FIFOTYPE}), ("4.png", b"", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}),
        ("5.png", b"", {"type": tarfile.DIRTYPE}), ("../../6.png", picture(6), {}), (f"{tmp_path}/7.png", picture(7), {}),
    ]  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    archive_of(tmp_path / "t", *entries)
    found = items(tmp_path / "t")
    assert [item.content for item in found] == [picture(6), picture(7)]
    assert found[0].name == "a.tar/6.png"
    assert found[1].name == f"a.tar{tmp_path}/7.png"
    assert sorted(tmp_path.rglob("*")) == [*before[:0], *sorted([*before, tmp_path / "t", tmp_path / "t" / "a.tar"])]


def header(name, size, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def padded(content):
    return content + bytes(-len(content) % 512)


def pax(key, value):
    record = f" {key}={value}\n".encode()
    length = len(record) + 2
    body = str(length + (length >= 100)).encode() + record
    return header("x", len(body), tarfile.XHDTYPE) + padded(body)


HUGE = {
    "image": header("1.png", 2**60),
    "caption": header("0.txt", 2**60),
    "long name": header("x", 2**60, tarfile.GNUTYPE_LONGNAME),
    "extended header": header("x", 2**60, tarfile.XHDTYPE),
    "size in an extended header": pax("size", 2**60) + header("1.png", 10),
    "negative": header("1.png", 10)[:124] + b"\xff" * 12 + header("1.png", 10)[136:],
}


@pytest.mark.parametrize("what", HUGE)
def test_huge_declared_sizes_cost_no_memory(tmp_path, what):
    """Also where the bytes are there: 256 MB of zeros, packed into little."""
    good = header("0.png", len(picture(5))) + padded(picture(5))
    block = HUGE[what]
    if what == "negative":  # with a valid sum
        total = sum(block[:148]) + 8 * 32 + sum(block[156:])
        block = block[:148] + f"{total:06o}\0 ".encode() + block[156:]
    with gzip.open(tmp_path / "a.tar.gz", "wb", compresslevel=1) as file:
        file.write(good + header("0.json", 0) + block)
        for _ in range(256):
            file.write(bytes(2**20))
    shards = TarShards(str(tmp_path), ["a.tar.gz"], LIMIT)
    failures: dict[str, str] = {}
    tracemalloc.start()
    found = list(passable(shards, 0, failures))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23
    assert [item.content for item in found if isinstance(item.content, bytes)] == [picture(5)]
    assert "ValueError" in failures["a.tar.gz"]


def test_large_members_are_named_and_passed_over(tmp_path):
    archive_of(tmp_path / "t", ("1.png", bytes(5000), {}), ("2.png", picture(2), {}))
    big, good = items(tmp_path / "t", limit=4999)
    assert isinstance(big.content, UnreadableImageError)
    assert "5000 bytes are above max_file_bytes=4999" in str(big.content)
    assert good.content == picture(2)


def test_a_truncated_archive_gives_what_is_whole(tmp_path):
    whole = write_shard(tmp_path / "a.tar", range(8), caption=False).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: 512 * 4 * 5 + 100])
    failures: dict[str, str] = {}
    taken = [item.content for item in passable(TarShards(str(tmp_path), ["a.tar"], LIMIT), 0, failures)]
    assert "truncated" in failures["a.tar"] or "ends in the middle" in failures["a.tar"]
    assert taken == [picture(number) for number in range(len(taken))]
    assert 4 <= len(taken) <= 7


def test_mutated_archives_raise_one_kind_of_error(tmp_path):
    draws = random.Random(0)
    entries = [("a/1.png", picture(1), {}), ("n" * 140 + ".png", picture(2), {}), ("é" * 60 + ".txt", b"x", {})]
    outcomes = set()
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        whole = (archive_of(tmp_path / "t", *entries, format=form) / "a.tar").read_bytes()
        for _ in range(1500):
            content = bytearray(whole[: draws.choice((len(whole), draws.randrange(len(whole))))])
            for _ in range(draws.choice((0, 1, 3, 10))):
                content[draws.randrange(min(len(content), 4096))] = draws.randrange(256) if content else 0
            if draws.random() < 0.5:  # sums that are right again
                for start in range(0, len(content) - 511, 512):
                    block = content[start : start + 512]
                    total = sum(block[:148]) + 8 * 32 + sum(block[156:])
                    content[start + 148 : start + 156] = f"{total & 0o777777:06o}\0 ".encode()
            try:
                outcomes.add(len([data() for _, size, data in members(io.BytesIO(content)) if size < LIMIT]))
            except ValueError as error:
                outcomes.add(type(error).__name__)
    assert {"ValueError", 3} <= outcomes
