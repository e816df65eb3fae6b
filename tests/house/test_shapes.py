"""Tensors have the shapes that their names say, wherever they cross from one part of the pipeline to another."""

from dataclasses import replace

import pytest
import torch
from beartype.roar import BeartypeDoorHintViolation

from tests.shapes import Watch, check, tensors
from tests.tiny_random import RandomTiny
from uae.miniature.tiny_janus import TinyJanus
from uae.models.finetune import Full
from uae.models.flow.policy import Exploration
from uae.policies import prepare
from uae.rewards import WeightedReward
from uae.rollout import SEGMENTS, Plan, roll_out, split
from uae.types import Captioner, Conditioner, ImageEncoder, ImagePolicy, Renderer, Sampling

B, G = 2, 3
EVERYWHERE = {
    "Captioner.prepare", "Captioner.sample", "Captioner.logprobs", "Conditioner.encode", "WeightedReward.__call__",
    "ImageEncoder.embed",
}  # fmt: skip
DRAWING = {
    "captions": {"Renderer.render"},
    "both": {"ImagePolicy.sample", "ImagePolicy.pixels", "ImagePolicy.logprobs"},
}


def rolled_out(umm, reward, plan, monkeypatch, references=()):
    """The experience, and the sizes of every boundary that was crossed."""
    watch = Watch(monkeypatch)
    watch.watch(umm.captioner, Captioner)
    watch.watch(umm.conditioner, Conditioner)
    watch.watch(umm.renderer, Renderer if plan.train == "captions" else ImagePolicy)
    for encoder in reward.encoders.values():
        watch.watch(encoder, ImageEncoder)
    batch = {"image": torch.rand(B, 3, 24, 24), "id": torch.arange(B)}
    scored = watch.checked(reward, WeightedReward, "__call__")
    experience = roll_out(umm, scored, batch, plan, 0, references)
    split(experience, 1)
    return experience, watch.crossed


def check_experience(experience, images, M):
    """All records of an experience, and what their sizes have to do with each other."""
    N = images * G
    whole, captions = check(tensors(experience)), check(tensors(experience.rollout))
    assert (whole["B"], whole["G"], whole["N"]) == (images, G, N * M)
    assert captions["R"] == captions["N"] == N == len(experience.rollout.texts)
    assert captions["S"] == captions["T"]
    rows = {name: check(tensors(segment))["R"] for name, segment in experience.segments.items()}
    assert rows.items() <= {"caption": N, "image": N * M}.items()


@pytest.mark.parametrize(
    ("system", "train", "M"),
    [(RandomTiny(), "captions", 1), (RandomTiny(denoising_steps=4), "both", 2), (TinyJanus(guidance=2), "both", 1)],
    ids=["captions", "denoising steps", "image tokens"],
)
def test_shapes_of_a_rollout(system, train, M, reward, monkeypatch):
    plan = Plan(group=G, sampling=Sampling(max_tokens=7), train=train, reconstructions=M)
    umm = prepare(system.build(), train, SEGMENTS[train], Full(), Full(), Exploration())
    experience, crossed = rolled_out(umm, reward, plan, monkeypatch, SEGMENTS[train])
    assert crossed.keys() == EVERYWHERE | DRAWING[train]
    assert experience.segments.keys() == set(SEGMENTS[train])
    check_experience(experience, B, M)
    check_experience(experience.select([1]), 1, M)
    assert crossed["Captioner.sample"]["R"] == crossed["Conditioner.encode"]["N"] == B * G
    assert crossed["WeightedReward.__call__"]["G"] == G * M
    drawn = crossed["Renderer.render" if train == "captions" else "ImagePolicy.sample"]
    assert drawn["N"] == drawn.get("R", drawn["N"]) == B * G * M


@pytest.mark.parametrize(
    ("role", "method", "change", "message"),
    [
        ("captioner", "logprobs", lambda logp_NT: logp_NT.T, r"Float\[Tensor, 'R S'\]"),
        ("captioner", "sample", lambda one: replace(one, mask_RS=one.mask_RS.bool()), r"Float\[Tensor, 'R S'\]"),
        ("captioner", "sample", lambda one: replace(one, tokens_NT=one.tokens_NT.int()), r"Int64\[Tensor, '6 T'\]"),
        ("renderer", "render", lambda images_NCHW: images_NCHW[1:], r"Float\[Tensor, '6 3 H W'\]"),
    ],
)
def test_a_wrong_shape_is_found(role, method, change, message, reward, monkeypatch):
    umm = RandomTiny().build()
    wrong = getattr(umm, role)
    right = getattr(wrong, method)
    monkeypatch.setattr(wrong, method, lambda *args: change(right(*args)))
    with pytest.raises(BeartypeDoorHintViolation, match=message):
        rolled_out(umm, reward, Plan(group=G, sampling=Sampling(max_tokens=7)), monkeypatch)


def test_a_transposed_reward_is_found(reward, monkeypatch):
    monkeypatch.setattr(type(reward.parts["letters"]), "__call__", lambda *_: torch.zeros(G, B))
    wrong = WeightedReward({"letters": reward.parts["letters"]}, {"letters": 1.0})
    with pytest.raises(BeartypeDoorHintViolation, match=r"Float\[Tensor, 'B G'\]"):
        rolled_out(RandomTiny().build(), wrong, Plan(group=G, sampling=Sampling(max_tokens=7)), monkeypatch)
