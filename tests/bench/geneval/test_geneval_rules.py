import random

import numpy as np
import pytest

from uae.bench.geneval.rules import COLORS, RELATIONS, TAGS, Detection, judge, objects_needing_color, relations

NAMES = ("cat", "dog", "car")


# ------------------------------------------------ the published rules once more, written from their description


class Failed(Exception):
    pass


def side(a, b):
    """Directions of box a from box b: offset of centers, less 0.1 of the summed sizes, over the offset's length."""
    a, b = (np.array(box, dtype=np.float32) for box in (a, b))
    half = np.float32(0.5)
    full = [((a[i] + a[i + 2]) * half) - ((b[i] + b[i + 2]) * half) for i in (0, 1)]
    rest = []
    for i in (0, 1):
        reach = abs(full[i]) - np.float32(0.1) * (abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]))
        rest.append(0.0 if reach <= 0 else float(reach) * (1 if full[i] > 0 else -1))
    if max(abs(rest[0]), abs(rest[1])) < 1e-3:
        return set()
    length = float(np.sqrt(full[0] * full[0] + full[1] * full[1]))
    seen = set()
    for value, negative, positive in ((rest[0], "left of", "right of"), (rest[1], "above", "below")):
        if abs(value / length) > 0.5:
            seen.add(negative if value < 0 else positive)
    return seen


def is_correct(metadata, found):
    """All of ``include`` and none of ``exclude``, by exceptions instead of flags."""
    limit = np.float32(0.9 if metadata["tag"] == "counting" else 0.3)
    kept = {}
    for name, rows in found.items():
        above = [(np.float32(row.score), i) for i, row in enumerate(rows) if np.float32(row.score) > limit]
        kept[name] = [rows[i] for _, i in sorted(above, reverse=True)][:16]
    passed, all_well = {}, True
    for place, want in enumerate(metadata["include"]):
        try:
            mine = kept.get(want["class"], [])[: want["count"]]
            if len(mine) != want["count"]:
                raise Failed
            if "color" in want and sum(one.color == want["color"] for one in mine) < want["count"]:
                raise Failed
            if "position" in want:
                relation, target = want["position"]
                if target not in passed or not all(relation in side(x.box, y.box) for x in mine for y in passed[target]):
                    raise Failed
            passed[place] = mine
        except Failed:
            all_well = False
    few_enough = all(len(kept.get(want["class"], [])) < want["count"] for want in metadata.get("exclude", []))
    return all_well and few_enough


# ---------------------------------------------------------------------------------------- prompts and detections


def prompt(tag, rng):
    a, b = rng.sample(NAMES, 2)
    count = rng.randint(2, 4)
    color, other = rng.sample(COLORS[:3], 2)
    include = {
        "single_object": [{"class": a, "count": 1}],
        "two_object": [{"class": a, "count": 1}, {"class": b, "count": 1}],
        "counting": [{"class": a, "count": count}],
        "colors": [{"class": a, "count": 1, "color": color}],
        "position": [
            {"class": a, "count": rng.choice((1, 1, 2))},
            {"class": b, "count": rng.choice((1, 1, 2)), "position": [rng.choice(RELATIONS), 0]},
        ],
        "color_attr": [{"class": a, "count": 1, "color": color}, {"class": b, "count": 1, "color": other}],
    }[tag]
    exclude = {"exclude": [{"class": a, "count": count + 1}]} if tag == "counting" else {}
    return {"tag": tag, "include": include, **exclude, "prompt": "..."}


def box(rng):
    grid = rng.choice((1, 10))  # coarse: ties, diagonals, equal centers; fine: everything else
    left, top = (rng.randrange(0, 60 // grid) * grid for _ in "xy")
    return left, top, left + rng.randint(1, 40 // grid) * grid, top + rng.randint(1, 40 // grid) * grid


def detections(rng, metadata):
    chosen = {}
    counting = metadata["tag"] == "counting"
    for name in rng.sample(NAMES, rng.choice((2, 3, 3))):
        number = rng.choice((0, 1, 1, 2, 3, 4, 5, 20))
        scores = [0.3, 0.30000001, 0.9, 0.9000001, 0.5, 0.95, 0.95, 0.29, rng.uniform(0.2, 1)]
        chosen[name] = [
            Detection(box(rng), rng.uniform(0.9, 1) if counting and rng.random() < 0.7 else rng.choice(scores), rng.choice(COLORS[:3]))
            for _ in range(number)
        ]
    return chosen


@pytest.mark.parametrize("tag", TAGS)
def test_verdicts_are_those_of_the_published_rules(tag):
    rng, correct = random.Random(tag), 0
    for _ in range(4000):
        metadata = prompt(tag, rng)
        found = detections(rng, metadata)
        verdict = judge(metadata, found)
        assert verdict.correct == is_correct(metadata, found), (metadata, found)
        assert verdict.correct == (not verdict.reasons)
        correct += verdict.correct
    assert 100 < correct < 3900  # both verdicts are tested


def test_relations_are_those_of_the_published_rule():
    rng, seen = random.Random(0), set()
    for _ in range(20000):
        a, b = box(rng), box(rng)
        assert relations(a, b) == side(a, b), (a, b)
        seen.add(frozenset(relations(a, b)))
    assert len(seen) == 9  # nothing, four sides, four diagonals


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 10, 10), (40, 0, 50, 10), {"left of"}),
        ((0, 0, 10, 10), (40, 40, 50, 50), {"left of", "above"}),
        ((1, 0, 11, 10), (3, 0, 13, 10), set()),
        ((5, 5, 9, 9), (5, 5, 9, 9), set()),  # no offset to divide by
        ((0, 40, 10, 50), (0, 0, 10, 10), {"below"}),  # y points down
    ],
)
def test_known_relations(a, b, expected):
    assert relations(a, b) == expected


def some(number, score=0.95, color=None, name="cat"):
    return {name: [Detection((i, 0, i + 1, 1), score, color) for i in range(number)]}


COUNTING = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}
RED = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}


def test_what_the_benchmark_forgives_and_what_not():
    single = {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}
    assert judge(single, some(9) | some(9, name="car")).correct  # extras are never wrong ...
    assert not judge(COUNTING, some(3)).correct  # ... but in counting
    assert judge(COUNTING, some(2)).correct
    assert judge(single, some(1, 0.31)).correct
    assert not judge(single, some(1, 0.3)).correct
    assert not judge(COUNTING, some(2, 0.9)).correct  # counting is asked to be sure
    assert "expected cat>=2, found 0" in judge(COUNTING, some(2, 0.9)).reasons


def test_no_more_than_16_of_a_class_are_looked_at():
    crowd = {"tag": "two_object", "include": [{"class": "cat", "count": 16}]}
    assert judge(crowd, some(40)).correct
    assert judge({**crowd, "include": [{"class": "cat", "count": 17}]}, some(40)).reasons == ("expected cat>=17, found 16",)


def test_colors_are_those_of_the_surest():
    surest = {"cat": [Detection((0, 0, 1, 1), 0.8, "blue"), Detection((2, 2, 3, 3), 0.9, "red")]}
    assert judge(RED, surest).correct
    assert not judge(RED, {"cat": [*surest["cat"], Detection((4, 4, 5, 5), 0.95, "blue")]}).correct


def test_only_colors_in_question_need_to_be_known():
    assert objects_needing_color(RED, {"cat": [0.5, 0.9, 0.2], "dog": [0.9]}) == {"cat": [1]}
    assert objects_needing_color(RED, {"cat": [0.2]}) == {}
    with pytest.raises(ValueError, match="no color of cat"):
        judge(RED, some(1))
    assert not judge(RED, some(1, 0.2)).correct


def test_a_position_needs_its_target():
    metadata = {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
    }
    assert "no target for cat to be left of" in judge(metadata, some(1)).reasons
    dog = {"dog": [Detection((50, 0, 60, 1), 0.9)]}
    assert judge(metadata, some(1) | dog).correct
    assert not judge(metadata, some(1) | {"dog": [Detection((0, 50, 1, 60), 0.9)]}).correct
