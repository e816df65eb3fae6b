import random
import re
from dataclasses import replace

import pytest

from uae.miniature.scenes import (
    DETAILED,
    TERSE,
    WORDS,
    Detail,
    Object,
    Scene,
    describe,
    is_detailed,
    parse,
    sample_scene,
)
from uae.miniature.scenes.captions import GRAMMAR
from uae.miniature.scenes.world import COLORS, COLUMNS, ROWS, SHAPES, SIZES

COUNT = 3000


@pytest.fixture(scope="module")
def scenes():
    rng = random.Random(11)
    return [sample_scene(rng) for _ in range(COUNT)]


def within(successes, trials, p):
    """Four and a half standard deviations of a binomial."""
    return abs(successes - trials * p) <= 4.5 * (trials * p * (1 - p)) ** 0.5


def test_a_caption_by_hand():
    ring, square = Object("top", "left", "red", "ring", "tiny"), Object("bottom", "center", "pink", "square", "large")
    scene = Scene("navy", (ring, square))
    assert describe(scene) == ("a tiny red ring at top left and a large pink square at bottom center on a navy background")
    assert describe(scene, Detail(False, False, False)) == "a red ring and a pink square"
    assert parse("a red ring and a large pink square at bottom center") == Scene(
        None, (Object(None, None, "red", "ring", None), square)
    )


def test_parse_reads_what_describe_writes(scenes):
    assert [parse(describe(scene)) for scene in scenes] == scenes


@pytest.mark.parametrize("size", [True, False])
@pytest.mark.parametrize("position", [True, False])
@pytest.mark.parametrize("background", [True, False])
def test_what_is_not_said_is_none_and_the_rest_is_kept(scenes, size, position, background):
    for scene in scenes[:300]:
        objects = tuple(
            replace(
                obj,
                size=obj.size if size else None,
                row=obj.row if position else None,
                column=obj.column if position else None,
            )
            for obj in scene.objects
        )
        text = describe(scene, Detail(size, position, background))
        assert parse(text) == Scene(scene.background if background else None, objects)
        assert is_detailed(text) == (size and position and background)
        assert set(text.split()) <= set(WORDS)


def test_tiny_objects_are_left_out_as_often_as_asked(scenes):
    rng, said, tiny = random.Random(0), 0, 0
    for scene in scenes:
        if all(obj.size == "tiny" for obj in scene.objects):
            continue  # there one object always stays
        caption = parse(describe(scene, Detail(omit_tiny=0.7), rng))
        sizes = [obj.size for obj in caption.objects]
        tiny += sum(obj.size == "tiny" for obj in scene.objects)
        said += sizes.count("tiny")
        assert [o for o in caption.objects if o.size != "tiny"] == [o for o in scene.objects if o.size != "tiny"]
    assert tiny > 1000
    assert within(said, tiny, 0.3)


def test_one_object_always_stays(scenes):
    only_tiny = [scene for scene in scenes if all(obj.size == "tiny" for obj in scene.objects)]
    kept = [parse(describe(scene, Detail(omit_tiny=1.0), random.Random(i))) for i, scene in enumerate(only_tiny)]
    assert {len(caption.objects) for caption in kept} == {1}
    assert {scene.objects.index(c.objects[0]) for scene, c in zip(only_tiny, kept, strict=True)} == {0, 1, 2}


def test_said_values_are_wrong_as_often_as_asked(scenes):
    """An error draws the value at random, so it is wrong with ``error * (1 - 1 / values)``; the background never is."""
    rng, error, total = random.Random(1), 0.3, 0
    wrong = dict.fromkeys(("color", "shape", "size", "row", "column"), 0)
    for scene in scenes:
        caption = parse(describe(scene, Detail(error=error), rng))
        assert caption.background == scene.background
        for said, true in zip(caption.objects, scene.objects, strict=True):
            total += 1
            for name in wrong:
                wrong[name] += getattr(said, name) != getattr(true, name)
    for name, values in {"color": COLORS, "shape": SHAPES, "size": SIZES, "row": ROWS, "column": COLUMNS}.items():
        assert within(wrong[name], total, error * (1 - 1 / len(values))), name


def test_shuffling_changes_the_order_and_nothing_else(scenes):
    rng, three = random.Random(2), [scene for scene in scenes if len(scene.objects) == 3]
    orders = []
    for scene in three:
        caption = parse(describe(scene, Detail(shuffle=True), rng))
        assert sorted(caption.objects) == sorted(scene.objects)
        orders.append(caption.objects == scene.objects)
    assert within(sum(orders), len(three), 1 / 6)


def test_chance_comes_from_the_generator_alone(scenes):
    detail = Detail(omit_tiny=0.5, error=0.5, shuffle=True)
    first, again, other = ([describe(scene, detail, rng) for scene in scenes[:100]] for rng in map(random.Random, (5, 5, 6)))
    assert first == again != other


def test_terse_says_color_and_shape_only(scenes):
    rng = random.Random(0)
    texts = [describe(scene, TERSE, rng) for scene in scenes]
    phrase = rf"a ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
    assert all(re.fullmatch(rf"{phrase}( and {phrase}){{0,2}}", text) for text in texts)
    assert not any(map(is_detailed, texts))
    assert Detail() == DETAILED


@pytest.mark.parametrize(
    "text",
    [
        "", "a", "red square", "a red", "a square", "a red square ", " a red square", "a red square\n", "A red square",
        "a  red square", "a orange square", "a red red square", "a red square square", "a large tiny red square",
        "a red large square", "a red square at top", "a red square at left top", "a red square on a pink background",
        "a red square on a navy", "on a navy background", "a red square and", "a red square a red square",
        "a red square on a navy background and a red ring", "a red square and a red ring and a red cross and a red ring",
        "a red square at top left on a navy background on a navy background", "a red square.",
    ],
)  # fmt: skip
def test_invalid_captions_say_nothing(text):
    assert parse(text) is None
    assert not is_detailed(text)
    assert not re.fullmatch(GRAMMAR, text)


def test_a_caption_with_its_words_in_disorder_is_invalid(scenes):
    rng, valid = random.Random(4), 0
    for scene in scenes[:500]:
        words = describe(scene).split()
        rng.shuffle(words)
        valid += parse(" ".join(words)) is not None
    assert valid == 0
