"""What comes out of image files of every kind, and what is said of those that are none."""

import contextlib
import io
import os
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from uae.files.pictures import FORMATS, Reading, UnreadableImageError, read_picture

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import fuzz_images

RED = (255, 0, 0)
FLIP = Image.Transpose
STORED_AS = {  # by the standard: what was done to the upright picture before it was stored
    1: (), 2: (FLIP.FLIP_LEFT_RIGHT,), 3: (FLIP.ROTATE_180,), 4: (FLIP.FLIP_TOP_BOTTOM,), 5: (FLIP.TRANSPOSE,),
    6: (FLIP.ROTATE_90,), 7: (FLIP.TRANSVERSE,), 8: (FLIP.ROTATE_270,),
}  # fmt: skip


def encoded(image, kind="png", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def color(content, size=2):
    """The one colour of a picture, in 8-bit steps."""
    image = Reading(size, "squash")(content) * 255
    assert (image == image[:, :1, :1]).all()
    return image[:, 0, 0].tolist()


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize("orientation", STORED_AS)
def test_every_exif_orientation_shows_the_same_picture(orientation):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    stored = upright
    for turn in STORED_AS[orientation]:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("png", "tiff"):
        assert np.array_equal(read_picture(encoded(stored, kind, exif=exif)), upright)


def test_a_broken_exif_block_does_not_cost_the_image():
    content = encoded(Image.new("RGB", (4, 4), RED), "png", exif=b"II*\0\xff\xff\xff\xff" + b"x" * 30)
    assert color(content) == [255, 0, 0]


def test_animations_show_their_first_frame():
    frames = [Image.new("RGB", (4, 4), name) for name in ("red", "lime", "blue")]
    for kind, options in (("gif", {}), ("png", {}), ("webp", {"lossless": True}), ("tiff", {})):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert color(content) == [255, 0, 0], kind


def test_sixteen_bits_and_floats_keep_their_range():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    seen = np.asarray(read_picture(encoded(Image.fromarray(ramp))))[..., 0]
    assert np.array_equal(seen, np.arange(256).reshape(16, 16))
    wild = np.array([[np.nan, -1.0], [0.5, np.inf]], dtype=np.float32)
    seen = np.asarray(read_picture(encoded(Image.fromarray(wild), "tiff")))[..., 0]
    assert seen[0].tolist() == [0, 0]
    assert seen[1, 1] == 255


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize("sides", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
def test_no_shape_is_too_odd_and_nothing_disappears(fit, sides):
    image = Reading(16, fit)(encoded(Image.new("RGB", sides, RED)))
    assert image.shape == (3, 16, 16)
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    assert (image == red).all(0).any()
    assert ((image == red).all(0) | (image == 1).all(0)).all()


def test_bytes_files_and_streams_are_read_alike(tmp_path):
    content = encoded(Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)))
    (tmp_path / "x.png").write_bytes(content)
    reading = Reading(8)
    for file in (tmp_path / "x.png", str(tmp_path / "x.png"), io.BytesIO(content)):
        assert torch.equal(reading(file), reading(content))


def test_limits_are_checked_before_anything_is_read(tmp_path):
    content = encoded(Image.new("RGB", (20, 10)))
    (tmp_path / "x.png").write_bytes(content)
    for file in (content, tmp_path / "x.png", io.BytesIO(content)):
        Reading(4, max_pixels=200, max_file_bytes=len(content))(file)
        with pytest.raises(UnreadableImageError, match="max_pixels=199"):
            Reading(4, max_pixels=199)(file if not isinstance(file, io.BytesIO) else content)
        with pytest.raises(UnreadableImageError, match=f"max_file_bytes={len(content) - 1}"):
            Reading(4, max_file_bytes=len(content) - 1)(file if not isinstance(file, io.BytesIO) else io.BytesIO(content))
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(2**40)  # takes no space, and would take all memory
    begin = time.perf_counter()
    with pytest.raises(UnreadableImageError, match="1099511627776 bytes"):
        Reading(4)(tmp_path / "sparse.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UnreadableImageError, match="regular"):
        Reading(4)(tmp_path / "pipe.png")
    assert time.perf_counter() - begin < 5


def test_only_listed_formats_are_decoded():
    assert "EPS" not in FORMATS  # which would start another program
    content = encoded(Image.new("RGB", (4, 4)), "eps")
    with pytest.raises(UnreadableImageError, match=r"^none of BMP, GIF"):
        Reading(4)(content)


@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "webp", "tiff", "bmp", "ppm"])
def test_a_truncated_file_is_refused_wherever_it_ends(kind):
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    content = encoded(noise, kind)
    for end in (0, 1, 10, len(content) // 2, int(len(content) * 0.9)):
        with pytest.raises(UnreadableImageError) as error:
            Reading(4)(content[:end])
        assert "0x" not in str(error.value)
        assert len(str(error.value)) < 301


def test_small_files_that_decompress_to_much_stay_small():
    """Text, profile and pixels of 256 MB in a quarter of a megabyte."""
    import tracemalloc

    bomb = zlib.compress(bytes(2**28), 9)
    content = encoded(Image.new("RGB", (4, 4), RED))
    bodies = {b"zTXt": b"k\0\0" + bomb, b"iTXt": b"k\0\1\0\0\0" + bomb, b"iCCP": b"k\0\0" + bomb, b"IDAT": bomb}
    for kind, body in bodies.items():
        tracemalloc.start()
        with contextlib.suppress(UnreadableImageError):
            Reading(4)(content[:33] + png_chunk(kind, body) + content[33:])
        assert tracemalloc.get_traced_memory()[1] < 2**24, kind
        tracemalloc.stop()


def test_mutated_files_are_read_or_refused(capfd):
    """A part of benchmarks/fuzz_images.py, which also limits memory and time."""
    files = fuzz_images.originals()
    assert {kind for kind, _ in files} == {"png", "jpeg", "gif", "webp", "tiff", "bmp", "ppm"}
    results = [fuzz_images.outcome(fuzz_images.mutated(number, files)[2]) for number in range(1500)]
    capfd.readouterr()  # libtiff talks
    assert "WRONG" not in results  # and nothing but UnreadableImageError was raised
    assert 300 < results.count("read") < 1000
    assert [fuzz_images.outcome(content) for _, content in files] == ["read"] * len(files)
