import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from uae.miniature.metrics.scenes import agreement, shows
from uae.miniature.scenes import Object, Scene, describe, detect, parse, render, sample_scene, scene_of
from uae.miniature.scenes.world import BACKGROUNDS, COLORS, COLUMNS, ROWS, SHAPES, SIZES

COUNT = 3000


@pytest.fixture(scope="module")
def scenes():
    rng = random.Random(7)
    return [sample_scene(rng) for _ in range(COUNT)]


@pytest.fixture(scope="module")
def images(scenes):
    return render(scenes)


def right(images, scenes):
    """Per image: whether everything about it is read as in its scene, by either of the two scores."""
    pairs = list(zip(detect(images), scenes, strict=True))
    return [seen == scene or shows(seen, parse(describe(scene))) for seen, scene in pairs]


def empty(scenes):
    return render([Scene(scene.background, ()) for scene in scenes])


# ------------------------------------------------------------------------------------------------- render and detect


def test_a_picture_by_hand():
    scene = Scene("navy", (Object("middle", "right", "red", "ring", "tiny"),))
    expected = torch.tensor(BACKGROUNDS["navy"]).view(3, 1, 1).repeat(1, 24, 24)
    for y, x in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2)]:  # 3 x 3 without its hole
        expected[:, 8 + 2 + y, 16 + 2 + x] = torch.tensor(COLORS["red"])
    assert torch.equal(render([scene])[0], expected)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ("square", ["#####"] * 5),
        ("ring", ["#####", "#...#", "#...#", "#...#", "#####"]),
        ("cross", ["..#..", "..#..", "#####", "..#..", "..#.."]),
        ("triangle", ["..#..", "..#..", ".###.", ".###.", "#####"]),
    ],
)
def test_shapes_look_like_themselves(shape, rows):
    cell = render([Scene("black", (Object("top", "left", "white", shape, "medium"),))])[0, 0, :8, :8]
    assert ["".join(".#"[int(pixel)] for pixel in row[1:6]) for row in cell[1:6]] == rows
    assert cell.sum() == sum(row.count("#") for row in rows)


def test_detect_reads_what_render_draws(scenes, images):
    assert images.shape == (COUNT, 3, 24, 24)
    assert detect(images) == scenes


def test_every_object_is_read_in_every_cell_on_every_background():
    everything = [
        Scene(paper, (Object(row, column, color, shape, size),))
        for paper in BACKGROUNDS
        for color in COLORS
        for shape in SHAPES
        for size in SIZES
        for row in ROWS
        for column in COLUMNS
    ]
    assert len(everything) == 4 * 96 * 9
    assert detect(render(everything)) == everything


@pytest.mark.parametrize(("deviation", "least"), [(4 / 255, 1.0), (0.05, 0.995), (0.1, 0.97)])
def test_detect_under_noise(scenes, images, deviation, least):
    noise = deviation * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    found = detect((images + noise).clamp(0, 1))
    assert sum(a == b for a, b in zip(found, scenes, strict=True)) >= least * COUNT


def test_detect_does_not_depend_on_the_batch(scenes, images):
    noisy = images[:50] + 0.2 * torch.rand(50, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    assert detect(noisy) == [detect(image[None])[0] for image in noisy]


# ------------------------------------------------------------------------------------------------------ must-fail


@pytest.mark.parametrize("color", [*BACKGROUNDS.values(), *COLORS.values()])
def test_a_blank_image_shows_no_scene(scenes, color):
    blank = torch.tensor(color).view(1, 3, 1, 1).expand(1, 3, 24, 24)
    assert not any(right(blank.expand(200, -1, -1, -1), scenes[:200]))


def test_a_collage_that_holds_every_object_is_not_right(scenes):
    crowded = []
    for scene in scenes[:300]:
        fillers = [Object(r, c, "red", "square", "large") for r in ROWS for c in COLUMNS]
        kept = {(obj.row, obj.column): obj for obj in fillers} | {(obj.row, obj.column): obj for obj in scene.objects}
        crowded.append(Scene(scene.background, tuple(kept.values())))
    found = detect(render(crowded))
    assert agreement(found, scenes[:300])["placed"] == 1  # every object is there, and yet:
    assert not any(right(render(crowded), scenes[:300]))


def test_half_blended_images_show_neither(scenes, images):
    others = images.roll(1, 0)
    assert not any(right((images + others) / 2, scenes))
    assert not any(right((images + others) / 2, scenes[-1:] + scenes[:-1]))


def test_half_transparent_objects_are_not_there(scenes, images):
    assert not any(right((images + empty(scenes)) / 2, scenes))


def test_colors_off_the_palette_are_not_right(scenes, images):
    assert not any(right(1 - images, scenes))
    gray_and_white = [s for s in scenes if s.background == "gray" and all(o.color == "white" for o in s.objects)]
    swapped = right(images.roll(1, 1), scenes)  # red as green, green as blue, blue as red
    colorful = [r for r, scene in zip(swapped, scenes, strict=True) if scene not in gray_and_white]
    assert sum(colorful) <= 0.02 * len(colorful)  # some are near another palette color that means the same


def test_specks_are_not_objects(scenes):
    rng, specks = random.Random(3), empty(scenes)
    for image, scene in zip(specks, scenes, strict=True):
        for obj in scene.objects:
            y, x = 8 * ROWS.index(obj.row) + rng.randrange(8), 8 * COLUMNS.index(obj.column) + rng.randrange(8)
            image[:, y, x] = torch.tensor(COLORS[obj.color])
    assert not any(right(specks, scenes))


def test_captions_shuffled_across_images_are_right_by_chance_only(scenes, images):
    found = detect(images)
    assert agreement(found, scenes)["whole"] == 1
    moved = scenes[1:] + scenes[:1]
    assert agreement(found, moved)["whole"] == sum(a == b for a, b in zip(scenes, moved, strict=True)) / COUNT < 0.005
    assert sum(right(images, moved)) < 0.005 * COUNT


def test_unknown_objects_are_never_right():
    scene = Scene("black", (Object("top", "left", "red", "square", "large"),))
    image = render([scene])
    image[:, :, :8, :8] = torch.eye(8).flip(0).cumsum(0) % 2  # stripes, nothing of this world
    (seen,) = detect(image)
    assert [obj.shape for obj in seen.objects] == ["unknown"]
    assert agreement([seen], [scene]) == {
        "placed": 1.0, "color": 0.0, "shape": 0.0, "size": 0.0, "background": 1.0, "whole": 0.0,
    }  # fmt: skip
    for caption in (scene, Scene(None, (Object(None, None, "red", "square", None),))):
        assert not shows(seen, caption)
    assert parse("a unknown unknown") is None


# ---------------------------------------------------------------------------------------------------------- splits


def test_a_scene_belongs_to_one_split_whatever_its_order():
    rng = random.Random(0)
    for _ in range(500):
        scene = sample_scene(rng)
        assert scene.split == replace(scene, objects=scene.objects[::-1]).split


def test_splits_are_disjoint_and_of_their_sizes(scenes):
    drawn = {split: {scene_of(i, split, seed=split == "val") for i in range(400)} for split in ("train", "val", "test")}
    assert all(scene.split == split for split, some in drawn.items() for scene in some)
    assert not drawn["train"] & drawn["val"] | drawn["train"] & drawn["test"] | drawn["val"] & drawn["test"]
    share = {split: sum(scene.split == split for scene in scenes) / COUNT for split in drawn}
    for split, p in {"test": 26 / 256, "val": 26 / 256, "train": 204 / 256}.items():  # of a byte's 256 values
        assert abs(share[split] - p) < 4 * (p * (1 - p) / COUNT) ** 0.5


def test_scenes_are_the_same_in_every_process():
    code = "from uae.miniature.scenes import *; print(repr([scene_of(i, s, 3) for s in ('train', 'val') for i in range(20)]))"
    here = repr([scene_of(i, s, 3) for s in ("train", "val") for i in range(20)])
    there = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert there.strip() == here


def test_splits_never_change():
    """Weights were trained on these scenes: another hash would leak test scenes into training."""
    first = (
        Object("top", "center", "purple", "ring", "medium"),
        Object("middle", "left", "blue", "square", "medium"),
        Object("middle", "right", "blue", "square", "large"),
    )
    assert scene_of(0, "test") == Scene("brown", first)
    rings = [Scene(paper, (Object("middle", "center", c, "ring", "medium"),)) for paper in BACKGROUNDS for c in COLORS]
    assert "".join(ring.split[1] for ring in rings) == "rrrrrrrrrrrrerrrrrrerrarrrrrrrrr"  # tRain, vAl, tEst


def test_scenes_are_well_formed_and_every_value_occurs(scenes):
    for scene in scenes:
        cells = [(ROWS.index(obj.row), COLUMNS.index(obj.column)) for obj in scene.objects]
        assert 1 <= len(cells) <= 3
        assert cells == sorted(set(cells))
    objects = [obj for scene in scenes for obj in scene.objects]
    for name, values in {"color": COLORS, "shape": SHAPES, "size": SIZES, "row": ROWS, "column": COLUMNS}.items():
        for value in values:
            p, n = 1 / len(values), len(objects)
            seen = sum(getattr(obj, name) == value for obj in objects)
            assert abs(seen - p * n) < 4.5 * (n * p * (1 - p)) ** 0.5, (name, value)
