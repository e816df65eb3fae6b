import io
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from uae.models.renderers.answers import PictureCache, as_pixels, picture_of

torch.set_num_threads(1)


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))


def as_png(image, **settings):
    stream = io.BytesIO()
    image.save(stream, format="PNG", **settings)
    return stream.getvalue()


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def upside_down(image):
    """Stored rotated by half a turn, with the note that says so."""
    exif = Image.Exif()
    exif[0x0112] = 3
    return as_png(image.rotate(180), exif=exif)


@pytest.mark.parametrize(
    "form",
    [
        as_png,
        upside_down,
        lambda image: image,
        lambda image: image.convert("RGBA"),
        as_tensor,
        lambda image: as_tensor(image) / 255,
        lambda image: (as_tensor(image) / 255).double().requires_grad_(),
    ],
    ids=["bytes", "rotated bytes", "PIL", "alpha", "uint8", "float", "float with a gradient"],
)
def test_a_client_may_answer_in_any_form(picture, form):
    assert np.array_equal(picture_of(form(picture)), picture)


def test_transparent_is_white():
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert np.array(picture_of(image)).tolist() == np.full((2, 2, 3), 255).tolist()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>busy</html>", "none of BMP"),
        ({"url": "..."}, "answered dict; allowed: bytes, PIL.Image, Tensor"),
        (torch.ones(8, 8, 3), r"\[8, 8, 3\]; allowed: \[3, H, W\]"),
        (torch.ones(1, 3, 8, 8), r"\[1, 3, 8, 8\]"),
        (torch.full((3, 8, 8), 1.5), "in .0, 1."),
        (torch.full((3, 8, 8), torch.nan), "in .0, 1."),
        (torch.ones(3, 8, 8, dtype=torch.int64), "torch.int64"),
    ],
)
def test_what_is_no_picture_is_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        picture_of(answer)


@pytest.mark.parametrize("size", [(24, 36), (7, 12), (50, 41)])
def test_pixels_are_height_by_width_and_resized_smoothly(picture, size):
    smooth = picture.resize((36, 24), Image.Resampling.BICUBIC)
    pixels = as_pixels(smooth, *size)
    assert pixels.dtype is torch.float32
    reference = torch.nn.functional.interpolate(as_tensor(smooth)[None] / 255, size, mode="bicubic", antialias=True)
    assert (pixels - reference[0].clamp(0, 1)).abs().max() < (1e-7 if size == (24, 36) else 3 / 255)


def test_every_part_of_the_key_counts_and_nothing_is_lost(tmp_path, picture):
    cache = PictureCache(str(tmp_path))
    keys = [("a", "b", 1), ("a", "b", 2), ("ab", "", 1), ("a", "b1"), ('a", "b', 1)]
    assert len({cache.file(*key) for key in keys}) == len(keys)
    assert cache.read(*keys[0]) is None
    cache.write(picture, *keys[0])
    assert np.array_equal(PictureCache(str(tmp_path)).read(*keys[0]), picture)


@pytest.mark.parametrize("end", ["kill", "error"])
def test_a_write_that_is_cut_off_leaves_no_entry(tmp_path, picture, end):
    cache = PictureCache(str(tmp_path))

    class Half:
        """A picture whose file is never finished."""

        def save(self, stream, **_):
            data = as_png(picture)
            stream.write(data[: len(data) // 2])
            stream.flush()
            if end == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("No space left on device")

    child = os.fork()
    if not child:
        try:
            cache.write(Half(), "a")
        except OSError:
            os._exit(7)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == (signal.SIGKILL if end == "kill" else 7 << 8)
    assert len(list(tmp_path.rglob("*.part"))) == (1 if end == "kill" else 0)
    assert not list(tmp_path.rglob("*.png"))
    assert cache.read("a") is None
    cache.write(picture, "a")
    assert np.array_equal(cache.read("a"), picture)
