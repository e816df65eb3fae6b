import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def same_weights_every_time():
    """Libraries draw the start of the tiny models from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
