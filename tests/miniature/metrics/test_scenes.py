import random
from itertools import permutations

import pytest
import torch

from tests.two_processes import run_on_two
from uae.miniature.metrics.scenes import SceneScore, agreement, matches, shows
from uae.miniature.scenes import TERSE, Detail, Object, Scene, describe, detect, parse, render, sample_scene

RED_RING = Object("top", "left", "red", "ring", "tiny")
RED_RING_2 = Object("middle", "center", "red", "ring", "large")
CYAN_SQUARE = Object("bottom", "right", "cyan", "square", "medium")
SCENE = Scene("gray", (RED_RING, RED_RING_2, CYAN_SQUARE))


def counts(text, scene=SCENE):
    return {name: count for name, count in matches(parse(text), scene).items() if count}


TRUTH = {"captions": 1, "objects": 3, "tiny": 1}
RIGHT = ("claims_right", "recalled")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (describe(SCENE), {"claims": 3, **dict.fromkeys(RIGHT, 3), "full": 3, "tiny_recalled": 1, "tiny_full": 1}),
        ("a red ring", {"claims": 1, **dict.fromkeys(RIGHT, 1), "tiny_recalled": 1}),
        ("a green ring", {"claims": 1}),
        # the second ring is claimed exactly; the bare claim gets what is left, though it comes first
        ("a red ring and a large red ring at middle center",
         {"claims": 2, **dict.fromkeys(RIGHT, 2), "full": 1, "tiny_recalled": 1}),
        ("a red ring and a tiny red ring at top left",
         {"claims": 2, **dict.fromkeys(RIGHT, 2), "full": 1, "tiny_recalled": 1, "tiny_full": 1}),
        # three claims of two rings: one is too many
        ("a red ring and a red ring and a red ring", {"claims": 3, **dict.fromkeys(RIGHT, 2), "tiny_recalled": 1}),
        # the same exact claim twice: the second takes the other ring, but is not fully right
        ("a tiny red ring at top left and a tiny red ring at top left",
         {"claims": 2, **dict.fromkeys(RIGHT, 2), "full": 1, "tiny_recalled": 1, "tiny_full": 1}),
        ("a large cyan square at bottom right", {"claims": 1, **dict.fromkeys(RIGHT, 1)}),  # wrong size
        ("a medium cyan square", {"claims": 1, **dict.fromkeys(RIGHT, 1)}),  # no position: not full
        ("a cyan square at bottom right", {"claims": 1, **dict.fromkeys(RIGHT, 1)}),  # no size: not full
    ],
)  # fmt: skip
def test_known_counts(text, expected):
    assert counts(text) == {**TRUTH, "valid": 1, **expected}


@pytest.mark.parametrize("text", ["", "a ring that is red", "a red ring a red ring"])
def test_an_invalid_caption_claims_nothing(text):
    assert counts(text) == TRUTH


def brute_force(caption, scene):
    """The most objects that claims of their color and shape can take, over all assignments."""
    claims = [(o.color, o.shape) for o in caption.objects]
    objects = [(o.color, o.shape) for o in scene.objects]
    return max(
        sum(a == b for a, b in zip(claims, order, strict=False)) for order in permutations(objects + [None] * len(claims), len(claims))
    )


def test_claims_right_is_the_best_assignment():
    rng = random.Random(0)
    for _ in range(300):  # two colors and two shapes: many duplicates
        scene, other = (
            Scene("gray", tuple(Object(row, "left", rng.choice(("red", "blue")), rng.choice(("ring", "cross")), "tiny")
                                for row in ("top", "middle", "bottom")[: rng.randint(1, 3)]))
            for _ in range(2)
        )  # fmt: skip
        count = matches(other, scene)
        assert count["claims_right"] == count["recalled"] == brute_force(other, scene)
        assert count["full"] == len(set(scene.objects) & set(other.objects))


# ---------------------------------------------------------------------------------------------- shows and agreement


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (describe(SCENE), True),
        ("a red ring and a red ring and a cyan square", True),
        ("a cyan square and a large red ring and a red ring at top left on a gray background", True),
        ("a large red ring and a large red ring and a cyan square", False),  # one large ring is there
        ("a red ring and a cyan square", False),  # the image shows more
        ("a red ring and a red ring and a cyan square on a navy background", False),
        ("a red ring and a red ring and a cyan ring", False),
        ("a tiny red ring at middle center and a red ring and a cyan square", False),
        # the first claim could take either ring, the second only the first: they must be told apart
        ("a red ring and a tiny red ring and a cyan square", True),
    ],
)
def test_shows_is_strict(text, expected):
    assert shows(SCENE, parse(text)) is expected


def test_agreement_by_hand():
    seen = Scene("black", (
        Object("top", "left", "red", "square", "tiny"),  # wrong shape
        Object("middle", "left", "red", "ring", "large"),  # beside the true one: not placed
        CYAN_SQUARE,
    ))  # fmt: skip
    scores = agreement([seen, SCENE, SCENE, Scene("gray", ())], [SCENE] * 4)
    assert scores == {
        "placed": 8 / 12, "color": 8 / 8, "shape": 7 / 8, "size": 8 / 8, "background": 3 / 4, "whole": 2 / 4,
    }  # fmt: skip


def test_an_object_too_many_is_not_whole():
    more = Scene("gray", (*SCENE.objects[:2], Object("bottom", "left", "red", "ring", "tiny"), CYAN_SQUARE))
    assert agreement([more], [SCENE])["whole"] == 0
    assert agreement([more], [SCENE])["placed"] == 1


# ------------------------------------------------------------------------------------------------------- SceneScore


def test_scores_by_hand():
    alone = Scene("navy", (CYAN_SQUARE,))
    wrong = Scene("navy", (Object("bottom", "right", "cyan", "square", "large"),))
    texts = [describe(SCENE), "a red ring", "a medium cyan square on a navy background", "nonsense"]
    images = render([SCENE, SCENE, wrong, alone])
    metric = SceneScore()
    metric.update(texts[:1], images[:1], {"scene": [SCENE]})
    metric.update(texts[1:], images[1:], {"scene": [SCENE, alone, alone]})
    words = sum(len(text.split()) for text in texts)
    assert {name: round(value.item(), 6) for name, value in metric.compute().items()} == {
        "caption/valid": 0.75,
        "caption/words": words / 4,
        "caption/recall": (3 + 1 + 1 + 0) / 8,
        "caption/precision": 1.0,
        "caption/full": 3 / 8,
        "caption/tiny_recall": 1.0,
        "caption/tiny_full": 0.5,
        "reconstruction/whole": 0.75,  # the third shows another size
        "reconstruction/faithful": 0.25,  # the second caption says less, the third's size is not there, the last is none
    }


def test_nothing_seen_is_zero_everywhere():
    metric = SceneScore()
    metric.update([], torch.zeros(0, 3, 24, 24), {"scene": []})
    assert {value.item() for value in metric.compute().values()} == {0.0}


def test_ground_truth_scores_one_and_shuffled_captions_do_not():
    rng = random.Random(5)
    scenes = [sample_scene(rng) for _ in range(400)]
    images, texts = render(scenes), [describe(scene) for scene in scenes]
    right, shuffled = SceneScore(), SceneScore()
    right.update(texts, images, {"scene": scenes})
    shuffled.update(texts[1:] + texts[:1], images, {"scene": scenes})
    perfect = {name: value.item() for name, value in right.compute().items() if name != "caption/words"}
    assert set(perfect.values()) == {1.0}
    chance = shuffled.compute()
    assert chance["caption/recall"] < 0.12  # an object's color and shape: 1 in 32, and up to three tries
    assert chance["caption/full"] < 0.01
    assert chance["reconstruction/faithful"] < 0.01


def detailed_and_terse(rank, shares):
    rng = random.Random(3)
    scenes = [sample_scene(rng) for _ in range(40)]
    texts = [describe(scene, Detail() if i % 2 else TERSE, rng) for i, scene in enumerate(scenes)]
    metric = SceneScore()
    for rows in shares[rank]:
        images = render([scenes[row] for row in rows])
        metric.update([texts[row] for row in rows], images, {"scene": [scenes[row] for row in rows]})
    return {name: value.item() for name, value in metric.compute().items()}


def test_two_processes_equal_one():
    shares = [[range(15), range(15, 22)], [range(22, 40)]]
    first, second = run_on_two(detailed_and_terse, shares)
    assert first == second == detailed_and_terse(0, [shares[0] + shares[1]])


def test_noise_in_the_reconstruction_does_not_move_the_scores():
    rng = random.Random(9)
    scenes = [sample_scene(rng) for _ in range(100)]
    noisy = (render(scenes) + 0.03 * torch.randn(100, 3, 24, 24, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert detect(noisy) == scenes
    metric = SceneScore()
    metric.update([describe(scene) for scene in scenes], noisy, {"scene": scenes})
    assert metric.compute()["reconstruction/faithful"] == 1
