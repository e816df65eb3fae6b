import pytest
import torch

from uae.miniature import tiny
from uae.miniature.patch_autoencoder import PatchAutoencoder
from uae.miniature.scenes import render, scene_of


@pytest.fixture(scope="session")
def batch():
    scenes = [scene_of(i) for i in range(12)]
    return {"image": render(scenes), "id": torch.arange(12), "scene": scenes}


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A folder with an autoencoder."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    PatchAutoencoder.create(width=24).save_pretrained(folder / "decoder" / "vae")
    return folder


@pytest.fixture(autouse=True)
def not_the_package(weights, monkeypatch):
    """Objectives build on this autoencoder rather than on the package's."""
    from uae.miniature.pretraining import autoencoding, captioning, flow_matching

    for module in (tiny, autoencoding, captioning, flow_matching):
        monkeypatch.setattr(module, "WEIGHTS", weights)
