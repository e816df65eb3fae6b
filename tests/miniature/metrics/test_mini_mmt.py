import itertools
from collections import Counter

import pytest
import torch

from uae.miniature.callbacks.mini_mmt import MiniMMT
from uae.miniature.metrics.mini_mmt import SUBTASKS, likelihood, mini_mmt, questions
from uae.miniature.scenes import detect, parse
from uae.miniature.tiny import INSTRUCTION, create_captioner, processor

N = 100
CHANCE = 0.25 + 3 * (0.25 * 0.75 / N) ** 0.5
CHANGING = {"small_object_color": "color", "small_object_shape": "shape", "counting": "color"}


def truth(images, captions):
    """The oracle: reads the scene off the image and takes the caption that fits best."""
    pairs = zip(detect(images), captions, strict=True)
    return torch.tensor([[fit(parse(text), scene) for text in options] for scene, options in pairs])


def fit(caption, scene):
    return float((caption.background == scene.background) - len(set(caption.objects) ^ set(scene.objects)))


def objects(scene):
    return {(one.row, one.column): one for one in scene.objects}


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_questions_are_balanced_and_options_differ_in_one_attribute(subtask):
    asked = questions(subtask, 40)
    assert Counter(one.answer for one in asked) == dict.fromkeys(range(4), 10)
    assert asked == questions(subtask, 40) != questions(subtask, 40, seed=1)
    for one in asked:
        assert one.scenes[one.answer].split == "val"
        assert len(set(one.options)) == 4
        assert [parse(text) for text in one.options] == list(one.scenes)
        for left, right in itertools.combinations(one.scenes, 2):
            check(subtask, left, right)


def test_a_letter_stands_for_nothing():
    for letter in range(4):
        assert len({one.scenes[letter].background for one in questions("background", 40)}) == 4
        assert len({len(one.scenes[letter].objects) for one in questions("small_object_presence", 40)}) == 3


def check(subtask, left, right):
    if subtask == "background":
        assert left.background != right.background
        assert left.objects == right.objects
        return
    assert left.background == right.background
    mine, its = objects(left), objects(right)
    if subtask in CHANGING:
        assert mine.keys() == its.keys()
        changed = [(a, its[cell]) for cell, a in mine.items() if a != its[cell]]
        assert changed
        for a, b in changed:
            assert {name for name in ("color", "shape", "size") if getattr(a, name) != getattr(b, name)} == {CHANGING[subtask]}
            assert subtask == "counting" or a.size == "tiny"
        return
    only = [set(left.objects) - set(right.objects), set(right.objects) - set(left.objects)]
    if subtask == "small_object_presence":
        assert {one.size for side in only for one in side} == {"tiny"}
        return
    (a,), (b,) = only  # one object, elsewhere
    assert (a.color, a.shape, a.size) == (b.color, b.shape, b.size)
    assert (a.row, a.column) != (b.row, b.column)
    assert (a.size == "tiny") == (subtask == "small_object_place")


def test_the_oracle_gets_everything_right():
    assert {one.value for one in mini_mmt(truth, 40).values()} == {1.0}


@pytest.mark.parametrize("image", ["wrong", "black", "gray", "noise"])
def test_without_its_image_the_oracle_guesses(image):
    other = {
        "wrong": lambda images: images.roll(1, 0),
        "black": torch.zeros_like,
        "gray": lambda images: torch.full_like(images, 0.5),
        "noise": lambda images: torch.rand(images.shape, generator=torch.Generator().manual_seed(0)),
    }[image]
    found = mini_mmt(truth, N, image=other)
    assert {name for name, one in found.items() if one.value > CHANCE} == set()
    assert found["overall"].high < 0.35


@pytest.mark.parametrize("sign", [1, -1])
def test_the_words_alone_tell_nothing(sign):
    """Options were drawn before the truth: preferring long, short, early or late ones does not help."""

    def words(images, captions):
        value = lambda text: sign * (1000.0 * len(text.split()) + sum(map(ord, text)) % 997)  # noqa: E731
        return torch.tensor([[value(text) for text in options] for options in captions])

    def frequent(images, captions):
        """The option most like the others: what an odd one out would give away."""
        shared = [[[len(set(a.split()) & set(b.split())) for b in options] for a in options] for options in captions]
        return sign * torch.tensor(shared).float().sum(2)

    for scorer in (words, frequent):
        assert {name for name, one in mini_mmt(scorer, N).items() if one.value > CHANCE} == set()


def test_a_scorer_without_opinion_is_right_in_a_quarter():
    found = mini_mmt(lambda images, captions: torch.zeros(len(images), 4), 40)
    assert {one.value for one in found.values()} == {0.25}


@torch.no_grad()
def test_likelihood_is_the_mean_log_probability_of_each_option_by_itself():
    from uae.models.captioners.captioner import HFCaptioner

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        captioner = HFCaptioner(create_captioner(layers=2), processor(), INSTRUCTION)
    asked = questions("small_object_presence", 4)
    images = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    scores = likelihood(captioner)(images, [one.options for one in asked])
    words, model = captioner.processor.tokenizer, captioner.learner.network.base
    for b, one in enumerate(asked):
        for k, text in enumerate(one.options):
            context = captioner.prepare(images[b : b + 1])
            caption = torch.tensor([[*words(text)["input_ids"], words.eos_token_id]])
            inputs = context.inputs()
            ids = torch.cat([inputs["input_ids"], caption], 1)
            mask = torch.ones_like(ids)
            kinds = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, caption.shape[1]))
            out = model(**inputs | {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds})
            logits = out.logits[0, -caption.shape[1] - 1 : -1].float()
            logits[:, captioner.learner.network.banned_ids] = -torch.inf
            expected = logits.log_softmax(-1).gather(1, caption[0][:, None]).mean()
            assert scores[b, k].item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("n", [0, 2, 41])
def test_letters_cannot_be_unbalanced(n):
    with pytest.raises(ValueError, match="multiple"):
        questions("counting", n)
    with pytest.raises(ValueError, match="multiples of 4"):
        MiniMMT(n)
