import random

import pytest
import torch

from uae.miniature.patch_autoencoder import PatchAutoencoder
from uae.miniature.scenes import render, sample_scene


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return PatchAutoencoder.create(latent_channels=6, width=24).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def images():
    rng = random.Random(0)
    return render([sample_scene(rng) for _ in range(64)]) * 2 - 1


def test_shapes(vae, images):
    latents = vae.encode(images).latents
    assert latents.shape == (64, 6, 3, 3)
    assert vae.decode(latents).sample.shape == images.shape
    assert torch.equal(vae.encode(images, return_dict=False)[0], latents)
    assert torch.equal(vae.decode(latents, return_dict=False)[0], vae.decode(latents).sample)
    wide = torch.rand(1, 3, 16, 40)
    assert vae.decode(vae.encode(wide).latents).sample.shape == wide.shape


def test_cells_start_independent_of_their_neighbours(vae, images):
    changed = images[:1].clone()
    changed[:, :, 8:16, 16:24] += 0.7  # the cell in row 1, column 2
    moved = (vae.encode(changed).latents - vae.encode(images[:1]).latents).abs().sum((0, 1)) > 1e-6
    assert moved.nonzero().tolist() == [[1, 2]]
    latents = vae.encode(images[:1]).latents
    other = latents.clone()
    other[:, :, 1, 2] += 0.7
    moved = (vae.decode(other).sample - vae.decode(latents).sample).abs().sum((0, 1)) > 1e-6
    assert moved[8:16, 16:24].any()
    moved[8:16, 16:24] = False
    assert not moved.any()


def test_neighbours_can_be_learned(vae):
    """The taps beside the centre are zero, not absent."""
    vae.requires_grad_(True)
    vae.encode(torch.rand(2, 3, 24, 24)).latents.square().sum().backward()
    taps = [m.weight.grad for m in vae.encoder.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert all(grad[:, :, 0, 0].abs().sum() > 0 for grad in taps)


def test_the_input_reaches_every_pixel_of_its_cell_alike(vae):
    """Folding is a permutation: an image of constant cells has constant channel groups."""
    image = torch.zeros(1, 3, 24, 24)
    image[0, :, 3, 5] = 1
    seen = []
    vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    vae.encode(image)
    assert seen[0].shape == (1, 192, 3, 3)
    assert (seen[0] != seen[0].flatten()[-1]).nonzero()[:, 1].tolist() == [c * 64 + 3 * 8 + 5 for c in range(3)]


def test_standardized_latents_have_mean_zero_and_unit_variance(vae, images):
    before = vae.encode(images).latents
    vae.standardize(before)
    after = vae.encode(images).latents
    torch.testing.assert_close(after.mean((0, 2, 3)), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.std((0, 2, 3)), torch.ones(6), atol=1e-4, rtol=0)
    flat_before, flat_after = (x.transpose(0, 1).flatten(1) for x in (before, after))
    for channel in range(6):  # nothing but a shift and a scale
        assert torch.corrcoef(torch.stack([flat_before[channel], flat_after[channel]]))[0, 1] > 0.9999


def test_save_and_load(vae, images, tmp_path):
    vae.standardize(vae.encode(images).latents)
    vae.save_pretrained(tmp_path)
    again = PatchAutoencoder.from_pretrained(tmp_path)
    latents = vae.encode(images).latents
    assert torch.equal(again.encode(images).latents, latents)
    assert torch.equal(again.decode(latents).sample, vae.decode(latents).sample)
    assert again.config.latent_channels == 6
