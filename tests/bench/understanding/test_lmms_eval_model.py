"""Against a small double of lmms-eval: its base class, manifest and requests, with the signatures of version 0.7.3."""

import abc
import importlib
import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from uae.bench.system import load
from uae.miniature.scenes import render
from uae.miniature.scenes.world import scene_of
from uae.types import Sampling

CONFIG = Path(__file__).parents[3] / "configs" / "tiny.yaml"
SETTINGS = {"max_new_tokens": 12, "until": ["\n\n"]}
QUESTIONS = ["describe", "<image>\ndescribe", "red describe", "describe a red square at top left", "what is it"]


class Base(abc.ABC):
    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict, self.cached = 0, 1, {}, []
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *row: self.cached.append(row))

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        args = dict(pair.split("=", 1) for pair in arg_string.split(","))
        return cls(**args, **{name: value for name, value in (additional_config or {}).items() if value is not None})


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple = ()


MANIFESTS = types.SimpleNamespace(ModelManifest=ModelManifest)


@dataclass
class Instance:
    args: tuple


@pytest.fixture
def harness(monkeypatch):
    """The model as lmms-eval finds and makes it."""
    contents = {"": {}, ".api": {}, ".api.model": {"lmms": Base}, ".models": {}, ".models.registry_v2": vars(MANIFESTS)}
    for name, content in contents.items():
        module = types.ModuleType(f"lmms_eval{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"lmms_eval{name}", module)
    monkeypatch.delitem(sys.modules, "uae.bench.understanding.lmms_eval_model", raising=False)
    project = (CONFIG.parents[1] / "pyproject.toml").read_text()
    entry = re.search(r'\[project.entry-points."lmms_eval.models"\]\nuae = "(.+):(.+)"', project)
    manifest = getattr(importlib.import_module(entry[1]), entry[2])()
    module, name = manifest.simple_class_path.rsplit(".", 1)
    kind = getattr(importlib.import_module(module), name)
    assert manifest.model_id == "uae"
    assert issubclass(kind, Base)
    assert kind.is_simple  # lmms-eval refuses a class that is not of the manifest's kind

    def make(words="", **more):
        return kind.create_from_arg_string(f"config={CONFIG}{words}", {"device": "cpu", "batch_size": 2, **more})

    yield make
    sys.modules.pop("uae.bench.understanding.lmms_eval_model", None)


def pictures():
    scenes = render([scene_of(i, "val") for i in range(len(QUESTIONS))])
    return [Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()) for image in scenes]


def requests(model, per_row=lambda picture: [picture], settings=lambda i: SETTINGS):
    model.task_dict = {"mmmu_val": {"validation": [{"picture": picture} for picture in pictures()]}}
    take = lambda row: per_row(row["picture"])  # noqa: E731
    return [Instance((text, settings(i), take, i, "mmmu_val", "validation")) for i, text in enumerate(QUESTIONS)]


def expected(tokens=12):
    """Each question by itself, by the captioner alone."""
    captioner, answers = load(["--config", str(CONFIG)], "cpu").umm.captioner, []
    for text, picture in zip(QUESTIONS, pictures(), strict=True):
        image = torch.tensor(np.array(picture)).permute(2, 0, 1)[None] / 255
        context = captioner.prepare(image, text.replace("<image>", "").strip())
        answers += captioner.sample(context, 1, Sampling(0.0, tokens), [0]).texts
    return answers


def test_answers_are_the_captioners_own_in_any_batch(harness):
    one, three = harness(batch_size=1), harness(batch_size=3)
    wanted = expected()
    assert len(set(wanted)) == len(wanted)
    assert one.generate_until(requests(one)) == three.generate_until(requests(three)) == wanted
    assert [row[2] for row in three.cached] == wanted
    assert three.cached[1][:2] == ("generate_until", (QUESTIONS[1], SETTINGS))


def test_the_question_is_the_instruction_without_the_harness_placeholder(harness):
    model, asked = harness(), []
    prompt = model.captioner.prompt
    model.captioner.prompt = lambda text: asked.append(text) or prompt(text)
    model.generate_until(requests(model))
    assert asked == [QUESTIONS[0], "describe", *QUESTIONS[2:]]


def test_limits_and_stops_are_the_tasks(harness):
    model = harness(batch_size=5)
    short = model.generate_until(requests(model, settings=lambda i: {"max_new_tokens": 2 if i % 2 else 12}))
    assert [len(text.split()) for text in short[1::2]] == [2, 2]
    assert short[::2] == expected()[::2]
    word = expected()[0].split()[2]
    stopped = model.generate_until(requests(model, settings=lambda i: {"max_new_tokens": 12, "until": [word, "zzz"]}))
    assert stopped[0] == expected()[0].split(word)[0].strip()
    with pytest.raises(ValueError, match="greedily"):
        model.generate_until(requests(model, settings=lambda i: {"do_sample": True, "temperature": 0.7}))


def test_several_images_are_refused_or_joined(harness):
    model = harness()
    with pytest.raises(ValueError, match="question 0 of mmmu_val has 2 images.*several_images=join"):
        model.generate_until(requests(model, lambda picture: [picture, picture]))
    with pytest.raises(ValueError, match="has no image"):
        model.generate_until(requests(model, lambda picture: []))
    joined = harness(",several_images=join")
    assert len(joined.generate_until(requests(joined, lambda picture: [picture, picture.resize((24, 48))]))) == len(QUESTIONS)
    side_by_side = sys.modules[type(model).__module__].side_by_side
    row = side_by_side([Image.new("RGB", (10, 20), "red"), Image.new("RGB", (10, 40), "blue")])
    assert row.size == (30, 40)
    assert row.getpixel((19, 39)) == (255, 0, 0)
    assert row.getpixel((20, 0)) == (0, 0, 255)


def test_what_cannot_be_is_refused(harness, monkeypatch):
    for words, said in ((",several_images=all", "refuse, join"), (",batch_size=auto", "1 or more")):
        with pytest.raises((ValueError, TypeError), match=said):
            harness(words, **({"batch_size": None} if "batch" in words else {}))
    model = harness()
    with pytest.raises(NotImplementedError, match="other tasks"):
        model.loglikelihood([])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        harness()


def test_keys_of_the_configuration_can_be_set(harness):
    assert harness(",model.sampling.max_tokens=7").loaded.identity["model"]["init_args"]["sampling"]["max_tokens"] == 7
