import random
from dataclasses import replace

import pytest
import torch

from uae.miniature.metrics.mini_geneval import TASKS, mini_geneval, prompts
from uae.miniature.scenes import Object, Scene, parse, render
from uae.miniature.scenes.world import COLUMNS, ROWS
from uae.models.conditioners.states import TextConditioner
from uae.types import UMM

SAID = {  # attributes besides color and shape, and whether the background is said
    "single": (set(), False), "two": (set(), False), "counting": (set(), False), "background": (set(), True),
    "position": ({"row", "column"}, False), "size": ({"size"}, False),
}  # fmt: skip


class Painter:
    """Draws exactly what a caption says, and chooses what it leaves open; ``change`` spoils the scene."""

    def __init__(self, change=lambda scene: scene):
        self.change = change

    def render(self, condition, seeds, grad=False):
        assert len(condition) == len(seeds)
        return render([self.change(self.complete(parse(text), seed)) for text, seed in zip(condition.texts, seeds, strict=True)])

    def complete(self, caption, seed):
        rng = random.Random(seed)
        taken = {(obj.row, obj.column) for obj in caption.objects}
        free = [cell for cell in ((r, c) for r in ROWS for c in COLUMNS) if cell not in taken]
        rng.shuffle(free)
        objects = []
        for obj in caption.objects:
            row, column = (obj.row, obj.column) if obj.row else free.pop()
            objects.append(Object(row, column, obj.color, obj.shape, obj.size or rng.choice(("medium", "large"))))
        return Scene(caption.background or rng.choice(("black", "gray")), tuple(objects))


def system(change=lambda scene: scene):
    return UMM(None, TextConditioner(), Painter(change))


@pytest.mark.parametrize("task", TASKS)
def test_prompts_ask_for_their_task_and_nothing_else(task):
    said, background = SAID[task]
    captions = [parse(text) for text in prompts(task, 200)]
    assert {len(caption.objects) for caption in captions} == set(TASKS[task][0])
    for caption in captions:
        assert (caption.background is not None) == background
        for obj in caption.objects:
            assert {name for name in ("size", "row", "column") if getattr(obj, name)} == said
        if task == "counting":
            assert len({(obj.color, obj.shape) for obj in caption.objects}) == 1
    assert len(set(prompts(task, 200))) > 20
    assert prompts(task, 200) == prompts(task, 200) != prompts(task, 200, seed=1)
    assert prompts(task, 10) == prompts(task, 200)[:10]


def test_a_perfect_painter_is_perfect():
    assert mini_geneval(system(), n=16) == dict.fromkeys([*TASKS, "overall"], 1.0)


def add_one(scene):
    taken = {(obj.row, obj.column) for obj in scene.objects}
    row, column = next(cell for cell in ((r, c) for r in ROWS for c in COLUMNS) if cell not in taken)
    return replace(scene, objects=(*scene.objects, replace(scene.objects[0], row=row, column=column)))


def drop_one(scene):
    return replace(scene, objects=scene.objects[1:])


def other_paper(scene):
    return replace(scene, background={"black": "gray"}.get(scene.background, "black"))


def mirror(scene):
    other = {"left": "right", "right": "left", "center": "left"}
    return replace(scene, objects=tuple(replace(o, column=other[o.column]) for o in scene.objects))


def resize(scene):
    other = {"tiny": "medium", "medium": "large", "large": "tiny"}
    return replace(scene, objects=tuple(replace(o, size=other[o.size]) for o in scene.objects))


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        (add_one, set(TASKS)),
        (drop_one, set(TASKS)),
        (other_paper, {"background"}),
        (resize, {"size"}),
        (lambda scene: replace(scene, objects=tuple(replace(o, color="pink") for o in scene.objects)), None),
    ],
)
def test_a_mistake_fails_the_tasks_that_ask_for_it(change, failed):
    scores = mini_geneval(system(change), n=24)
    if failed is None:
        assert all(score < 0.35 for score in scores.values())  # one color in eight
        return
    for task in TASKS:
        assert scores[task] == (0.0 if task in failed else 1.0)
    assert scores["overall"] == pytest.approx(1 - len(failed) / 6)


def test_positions_are_checked():
    assert mini_geneval(system(mirror), n=24)["position"] < 0.2  # two alike may swap their places


def test_a_collage_and_a_blank_image_score_nothing():
    objects = [Object(r, c, "red", "square", "large") for r in ROWS for c in COLUMNS]
    for picture in (render([Scene("gray", tuple(objects))]), torch.zeros(1, 3, 24, 24), torch.ones(1, 3, 24, 24)):
        constant = type("Constant", (), {"render": lambda self, c, s, p=picture: p.expand(len(c), -1, -1, -1)})()
        assert set(mini_geneval(UMM(None, TextConditioner(), constant), n=8).values()) == {0.0}
