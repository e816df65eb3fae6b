import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.miniature.pretraining.objectives import built
from uae.miniature.scenes import describe, parse, sample_scene


@pytest.fixture
def flow(batch):
    objective = built("flow_matching")
    objective.clean = objective.frozen[0].pipe.vae.encode(batch["image"] * 2 - 1).latents.detach()
    return objective


def test_the_target_is_noise_minus_latent(flow, batch, monkeypatch):
    """A transformer that knows the latent, and so returns ``noise - latent``, has no loss; one that returns 0 has theirs."""
    flow.draws = 100
    clean = flow.clean.repeat(flow.draws, 1, 1, 1)
    times = []

    def velocity(noised, time, condition):
        times.append(time)
        assert len(noised) == len(condition) == 100 * len(batch["image"])
        return (noised - clean) / time[:, None, None, None]  # noised = latent + time * (noise - latent)

    monkeypatch.setattr(flow, "velocity", velocity)
    assert flow(batch, 1.0)["loss"] < 1e-8
    assert flow(batch, 1.0)["loss"] < 1e-8
    time = torch.cat(times)
    logit = (time / (1 - time)).log()
    assert abs(logit.mean() - 0.7) < 0.1
    assert abs(logit.std() - 1.2) < 0.1
    monkeypatch.setattr(flow, "velocity", lambda noised, time, condition: torch.zeros_like(noised))
    assert flow(batch, 1.0)["loss"].item() == pytest.approx(1 + clean.square().mean().item(), rel=0.05)


def test_the_velocity_is_the_renderers(flow, batch):
    """One Euler step of the pipeline from time 1 to 0 subtracts exactly this velocity."""
    renderer = flow.frozen[0]
    renderer.rendering = replace(renderer.rendering, steps=1)
    condition = flow.conditioner.encode([describe(scene) for scene in batch["scene"]])
    noise = [torch.randn(1, 16, 3, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(12)]
    with torch.no_grad():
        start = torch.cat(noise)
        end = start - flow.velocity(start, torch.ones(12), condition)
        expected = (renderer.pipe.vae.decode(end).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(renderer.render(condition, range(12)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("progress", "most"), [(0.0, 1), (0.11, 1), (0.13, 2), (0.29, 2), (0.31, 3), (1.0, 3)])
def test_the_number_of_objects_grows(flow, batch, monkeypatch, progress, most):
    said = []
    monkeypatch.setattr(flow, "caption", lambda scene: said.append(scene) or "a red ring")
    for _ in range(3):
        flow(batch, progress)
    for scene, full in zip(said, batch["scene"] * 3, strict=True):
        assert len(scene.objects) == min(most, len(full.objects))
        assert scene.background == full.background
        assert [obj for obj in full.objects if obj in scene.objects] == list(scene.objects)  # in reading order


def test_captions_of_every_detail(flow):
    flow.rng = random.Random(0)
    rng = random.Random(1)
    kinds: Counter[str] = Counter()
    for _ in range(4000):
        scene = sample_scene(rng)
        text = flow.caption(scene)
        caption = parse(text)
        kinds["empty"] += text == ""
        if caption is None:
            assert text == ""
            continue
        details = caption.background, caption.objects[0].size, caption.objects[0].row
        kinds["detailed"] += all(details)
        if any(details):
            assert len(caption.objects) == len(scene.objects)  # tiny objects are left out of terse captions only
        for obj in caption.objects:
            assert any((obj.color, obj.shape) == (true.color, true.shape) for true in scene.objects)
    assert abs(kinds["empty"] / 4000 - 0.05) < 0.015
    assert abs(kinds["detailed"] / 4000 - (0.5 + 0.45 / 8)) < 0.03


def test_the_autoencoder_is_not_trained(flow, batch):
    flow(batch, 1.0)["loss"].backward()
    assert not any("vae" in name for name, _ in flow.named_parameters())
    assert all(p.grad is None for p in flow.frozen[0].pipe.vae.parameters())
    assert all(p.grad is not None for p in flow.conditioner.projector.parameters())
