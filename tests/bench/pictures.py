"""Images of every size and mode that a folder may hold, and what they show, by the definitions of their formats."""

import numpy as np
from PIL import Image

UPSIDE_DOWN, LYING = 3, 6  # EXIF orientations


def shapes(height, width, seed, channels=3):
    """Smooth colour with hard edges, 8 bit."""
    draw = np.random.default_rng(seed)
    down, right = np.mgrid[:height, :width].astype(float)
    waves = [np.sin(down / (3 + 9 * a) + right / (2 + 9 * b)) for a, b in draw.random((channels, 2))]
    picture = (np.stack(waves, 2) * 100 + 128).astype(np.uint8)
    picture[height // 3 : height // 2, width // 4 : width // 2] = draw.integers(0, 255, channels)
    return picture


def upright(file):
    """uint8 ``[H, W, 3]`` of a file written below, computed from its raw numbers alone."""
    image = Image.open(file)
    raw = np.asarray(image).astype(np.float64)
    if image.mode == "P":
        rgb = np.array(image.getpalette("RGB")).reshape(-1, 3)[np.asarray(image)].astype(np.float64)
        seen = np.asarray(image) != image.info.get("transparency", -1)
        raw = np.where(seen[..., None], rgb, 255)
    elif image.mode == "RGBA":
        share = raw[..., 3:] / 255
        raw = raw[..., :3] * share + 255 * (1 - share)
    elif image.mode == "LA":
        share = raw[..., 1:] / 255
        raw = np.repeat(raw[..., :1] * share + 255 * (1 - share), 3, 2)
    elif image.mode == "CMYK":
        raw = (255 - raw[..., :3]) * (255 - raw[..., 3:]) / 255
    elif image.mode.startswith("I"):
        raw = np.repeat(raw[..., None] / 257, 3, 2)
    elif image.mode in ("L", "1"):
        raw = np.repeat(raw[..., None] * (255 if image.mode == "1" else 1), 3, 2)
    turns = {UPSIDE_DOWN: 2, LYING: -1}.get(image.getexif().get(0x0112), 0)
    return np.rint(np.rot90(raw, turns)).astype(np.uint8).copy()


def write_all(folder, seed=0):
    """One file of each kind; names are alike for all seeds, content is not."""
    folder.mkdir(parents=True)
    Image.fromarray(shapes(47, 62, seed)).save(folder / "odd.png")
    Image.fromarray(shapes(91, 40, seed + 1)).save(folder / "tall.bmp")
    Image.fromarray(shapes(28, 28, seed + 2)).save(folder / "exact.png")
    Image.fromarray(shapes(9, 300, seed + 3)).save(folder / "flat.webp", lossless=True)
    Image.fromarray(shapes(1, 1, seed + 4)).save(folder / "dot.png")
    turned = Image.Exif()
    for name, orientation in (("lying", LYING), ("upside_down", UPSIDE_DOWN)):
        turned[0x0112] = orientation
        Image.fromarray(shapes(51, 33, seed + 5 + orientation)).save(folder / f"{name}.png", exif=turned)
    Image.fromarray(shapes(40, 45, seed + 12, 4), "RGBA").save(folder / "see_through.png")
    Image.fromarray(shapes(36, 30, seed + 13)).quantize(7).save(folder / "palette.png", transparency=2)
    deep = shapes(33, 41, seed + 14, 1)[..., 0].astype(np.uint16) * 257 + 21
    Image.fromarray(deep).save(folder / "sixteen_bit.png")
    Image.fromarray(shapes(44, 38, seed + 15, 4), "CMYK").save(folder / "print.tiff")
    Image.fromarray(shapes(35, 52, seed + 16, 1)[..., 0]).save(folder / "grey.png")
    Image.fromarray(shapes(31, 37, seed + 17, 2), "LA").save(folder / "deeper_grey_alpha.png")
    Image.fromarray(shapes(30, 30, seed + 18, 1)[..., 0] > 128).save(folder / "black_white.png")
    return sorted(file.name for file in folder.iterdir())
