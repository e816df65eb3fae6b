"""What must not score: images that please a lenient scorer, or none at all. Every control is zero where chance is zero."""

import random
from collections import Counter
from itertools import product

import pytest
import torch

from uae.miniature.metrics.mini_geneval import TASKS, mini_geneval, prompts
from uae.miniature.metrics.scenes import shows
from uae.miniature.scenes import Object, Scene, detect, parse, render
from uae.miniature.scenes.world import BACKGROUNDS, CELL, COLORS, COLUMNS, ROWS, SHAPES, SIDE, SIZES
from uae.models.conditioners.states import TextConditioner
from uae.types import UMM

PROMPTS = {task: prompts(task, 24) for task in TASKS}


class Control:
    """Draws what a function of prompts makes of them."""

    def __init__(self, draw):
        self.draw = draw

    def render(self, condition, seeds, grad=False):
        return self.draw(condition.texts)


def scores(draw, n=24):
    return mini_geneval(UMM(None, TextConditioner(), Control(draw)), n=n)


def complete(text, rng=None, size="large", background="gray"):
    """The scene a prompt asks for; what it leaves open is the first free cell, ``size``, ``background``."""
    caption = parse(text)
    taken = {(obj.row, obj.column) for obj in caption.objects}
    free = [cell for cell in product(ROWS, COLUMNS) if cell not in taken]
    objects = [
        Object(*((obj.row, obj.column) if obj.row else free.pop(0)), obj.color, obj.shape, obj.size or size) for obj in caption.objects
    ]
    return Scene(caption.background or background, tuple(objects))


def perfect(texts):
    return render([complete(text) for text in texts])


def test_the_controls_start_from_perfect_images():
    assert set(scores(perfect).values()) == {1.0}


# ----------------------------------------------------------------------------------------- controls that score zero


def constant(scene):
    return lambda texts: render([scene]).expand(len(texts), -1, -1, -1)


def everything(texts):
    """A collage: all nine cells full, those the prompt asks for among them."""
    scenes = []
    for text in texts:
        scene = complete(text)
        taken = {(obj.row, obj.column) for obj in scene.objects}
        more = [Object(r, c, "red", "square", "large") for r, c in product(ROWS, COLUMNS) if (r, c) not in taken]
        scenes.append(Scene(scene.background, (*scene.objects, *more)))
    return render(scenes)


def painted(texts):
    """The prompt's own letters, as black and white pixels."""
    images = torch.full((len(texts), 3, SIDE, SIDE), 0.5)
    for image, text in zip(images, texts, strict=True):
        for i, letter in enumerate(text.encode()[: (SIDE // 3) * (SIDE // 5)]):
            y, x = divmod(i, SIDE // 3)
            bits = torch.tensor([(letter >> k) & 1 for k in range(8)], dtype=torch.float32)
            image[:, y * 5 : y * 5 + 4, x * 3 : x * 3 + 2] = bits.view(4, 2)
    return images


def ghosts(texts):
    """Every object half transparent, with a second one of another color shining through."""
    colors = list(COLORS)
    others = []
    for text in texts:
        scene = complete(text)
        moved = [Object(o.row, o.column, colors[(colors.index(o.color) + 3) % len(colors)], o.shape, o.size) for o in scene.objects]
        others.append(Scene(scene.background, tuple(moved)))
    return (perfect(texts) + render(others)) / 2


def specks(texts):
    """Every object as one pixel of its color, in the middle of its cell."""
    images = torch.full((len(texts), 3, SIDE, SIDE), 0.5)
    for image, text in zip(images, texts, strict=True):
        scene = complete(text)
        image[:] = torch.tensor(BACKGROUNDS[scene.background]).view(3, 1, 1)
        for obj in scene.objects:
            y, x = ROWS.index(obj.row) * CELL + CELL // 2, COLUMNS.index(obj.column) * CELL + CELL // 2
            image[:, y, x] = torch.tensor(COLORS[obj.color])
    return images


def off_palette(texts):
    """Every color replaced by its complement, which is none of the palette's."""
    images = perfect(texts)
    for n, text in enumerate(texts):
        paper = torch.tensor(BACKGROUNDS[complete(text).background]).view(3, 1, 1)
        ink = (images[n] != paper).any(0)
        images[n][:, ink] = (images[n][:, ink] + torch.tensor([0.45, 0.55, 0.5]).view(3, 1)) % 1
    return images


def shifted(texts):
    """Right in everything, but pushed over the image's border by half a cell."""
    return torch.roll(perfect(texts), (CELL // 2, CELL // 2), (2, 3))


def huge(texts):
    """The first object over the whole image, touching every border."""
    images = perfect(texts)
    for n, text in enumerate(texts):
        images[n] = torch.tensor(COLORS[parse(text).objects[0].color]).view(3, 1, 1)
    return images


CONTROLS = {
    "black": lambda texts: torch.zeros(len(texts), 3, SIDE, SIDE),
    "gray": lambda texts: torch.full((len(texts), 3, SIDE, SIDE), 0.5),
    "noise": lambda texts: torch.rand(len(texts), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)),
    "everything": everything,
    "painted text": painted,
    "ghosts": ghosts,
    "specks": specks,
    "off palette": off_palette,
    "over the border": shifted,
    "huge": huge,
}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_scores_nothing(name):
    assert set(scores(CONTROLS[name]).values()) == {0.0}


# ----------------------------------------------------------------------------------- controls that score by chance


def test_the_best_single_image_answers_only_the_prompts_it_shows():
    """Of all images with one or two objects of a prompt, the one that shows most: it gains its own prompt's share."""
    for task, texts in PROMPTS.items():
        captions = [parse(text) for text in texts]
        best = max((complete(text) for text in texts), key=lambda scene: sum(shows(scene, caption) for caption in captions))
        alike = max(Counter(texts).values())
        assert scores(constant(best))[task] == sum(shows(best, caption) for caption in captions) / len(texts)
        assert alike / len(texts) <= scores(constant(best))[task] <= 4 / len(texts)


def test_shuffled_images_score_the_chance_of_their_prompts():
    """An image of another prompt is right as often as that prompt's scene shows this prompt: counted over all pairs."""
    n, order = 96, random.Random(0)
    asked = {task: prompts(task, n) for task in TASKS}
    trials = []
    for _ in range(12):
        shuffle = {}
        for texts in asked.values():
            taken = texts[:]
            order.shuffle(taken)
            shuffle[tuple(texts)] = taken
        trials.append(scores(lambda texts, shuffle=shuffle: perfect(shuffle[tuple(texts)]), n))
    for task, texts in asked.items():
        captions, scenes = [parse(text) for text in texts], [complete(text) for text in texts]
        chance = sum(shows(scene, caption) for scene in scenes for caption in captions) / n**2
        mean = sum(trial[task] for trial in trials) / len(trials)
        assert abs(mean - chance) < 4 * (chance * (1 - chance) / (n * len(trials))) ** 0.5
    one = sum(1 for _ in product(COLORS, SHAPES))
    single = [parse(text) for text in prompts("single", 3000)]
    pairs = Counter((caption.objects[0].color, caption.objects[0].shape) for caption in single)
    assert sum(count**2 for count in pairs.values()) / 3000**2 == pytest.approx(1 / one, rel=0.05)  # 1 in 32


def test_the_controls_are_what_they_say():
    texts = PROMPTS["size"]
    assert (everything(texts) != perfect(texts)).any()
    blends = [any(obj.shape == "unknown" for obj in scene.objects) for scene in detect(ghosts(texts))]
    assert sum(blends) > len(texts) / 2  # of some colors the blend is a third one, and as wrong
    assert all(len(detect(image[None])[0].objects) == 9 for image in everything(texts))
    assert min(SIZES.values()) > 1  # a speck is smaller than any object
