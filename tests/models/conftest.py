import copy

import pytest
import torch

from tests.models import families
from uae.types import Sampling


@pytest.fixture(scope="session")
def created():
    """Captioners by family, made on demand. Not to be changed."""
    cache = {}

    def create(family):
        if family not in cache:
            cache[family] = families.create(family)
        return cache[family]

    return create


@pytest.fixture(params=families.FAMILIES)
def captioner(request, created):
    return created(request.param)


@pytest.fixture
def fresh(created):
    """A captioner of the first family that a test may change."""
    return copy.deepcopy(created("qwen2_5_vl"))


@pytest.fixture(scope="session")
def images():
    """Two images of different sizes."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, 24, width, generator=generator) for width in (24, 40)]


@pytest.fixture
def rollout(captioner, images):
    """Early and late ends, left padding (where the processor makes some), a temperature."""
    return captioner.sample(captioner.prepare(images), 6, Sampling(0.7, 8), range(12))


@pytest.fixture(scope="session")
def decoder():
    """Conditioner and renderer with random weights. Not to be changed."""
    from uae.miniature.tiny import create_decoder

    with torch.random.fork_rng():
        torch.manual_seed(0)
        conditioner, renderer = create_decoder(width=64, layers=2, steps=3)
        for module in (renderer.pipe.transformer, conditioner.projector):
            for weight in module.parameters():
                if weight.ndim > 1:  # large enough that every word matters
                    torch.nn.init.normal_(weight, 0, 1.5 / weight[0].numel() ** 0.5)
    return conditioner.requires_grad_(False).eval(), renderer
