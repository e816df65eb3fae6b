import torch

from tests.miniature.pretraining.objectives import built, loss
from uae.miniature.patch_autoencoder import PatchAutoencoder
from uae.miniature.pretraining import AutoencoderObjective
from uae.miniature.pretraining.autoencoding import inverse_area
from uae.miniature.scenes import Object, Scene, render, scene_of


def test_pixel_weights_by_hand():
    scene = Scene("black", (
        Object("top", "left", "red", "ring", "tiny"), Object("middle", "right", "cyan", "square", "large"),
    ))  # fmt: skip
    weights = inverse_area(render([scene]))
    expected = torch.ones(1, 1, 24, 24)
    expected[..., 2:5, 2:5] += 40 / 9  # the hole counts
    expected[..., 8:15, 16:23] += 40 / 49
    torch.testing.assert_close(weights, expected)


def test_saved_latents_have_unit_variance(batch, tmp_path):
    objective = built("autoencoding").eval()
    objective.save(tmp_path)
    vae = PatchAutoencoder.from_pretrained(tmp_path / "decoder" / "vae")
    scenes = [scene_of(i, "val") for i in range(500)]
    with torch.no_grad():
        latents = vae.encode(render(scenes) * 2 - 1).latents
    assert (latents.mean((0, 2, 3)).abs() < 0.1).all()
    assert ((latents.std((0, 2, 3)) - 1).abs() < 0.1).all()


def test_sharpening_leaves_the_latents_as_they_are(batch, weights, tmp_path):
    objective = AutoencoderObjective(sharpen="package")
    objective.build()
    start = PatchAutoencoder.from_pretrained(weights / "decoder" / "vae")
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], 0.3)
    loss(objective, batch).backward()
    optimizer.step()
    objective.save(tmp_path)
    vae = PatchAutoencoder.from_pretrained(tmp_path / "decoder" / "vae")
    images = batch["image"] * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(vae.encode(images).latents, start.encode(images).latents, atol=0.01, rtol=0)
        latents = start.encode(images).latents
        assert (vae.decode(latents).sample - start.decode(latents).sample).abs().max() > 0.02
