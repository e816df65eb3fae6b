"""Random-weight models of real library classes, small enough for a test, and the parts of a run around them."""

import copy
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from lightning.pytorch import Trainer

from tests.tiny_random import RandomTiny
from uae.encoders import LayoutEncoder
from uae.grpo import GRPOLoss
from uae.miniature.data import SceneData
from uae.rehearsal.catalog import write
from uae.rewards import BaseReward, EncoderSimilarity, WeightedReward
from uae.types import Sampling

ROOT = Path(__file__).parents[1]

# A busy machine is no fault of what is tested: hypothesis would fail an example that takes more than 200 ms.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Lightning writes its rank into the environment: a command started later would wait for the processes of that run."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_in_the_checkout():
    """A trainer without a folder writes to the working directory, from where its files would get into a commit."""

    def files():
        return {path.name for name in ("skipped.rank*", "lightning_logs", "checkpoints", "export") for path in ROOT.glob(name)}

    before = files()
    yield
    assert files() <= before, "give the trainer a default_root_dir"


@pytest.fixture(scope="module", autouse=True)
def same_weights_every_time():
    """Libraries draw the start of tiny models from the global generator: it must not depend on which files ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Copies:
    """A system whose every build is a fresh copy of the same model."""

    def __init__(self, umm):
        self.umm = umm

    def build(self):
        return copy.deepcopy(self.umm)


class Letters(BaseReward):
    """A number per caption, in [0, 1): spreads within a group, where random decoders draw much the same."""

    def __call__(self, sources_BCHW, reconstructions_NCHW, texts):
        values = [sum(map(ord, text)) % 17 / 17 for text in texts]
        return torch.tensor(values).view(len(sources_BCHW), -1)


def data(**changes):
    """Few scenes in small batches."""
    return SceneData(**{"batch_size": 4, "train_size": 16, "val_size": 6, "eval_batch_size": 4, **changes})


@pytest.fixture(scope="session")
def system():
    return Copies(RandomTiny(spread=0.025).build())


@pytest.fixture(scope="session")
def reward():
    parts = {"layout": EncoderSimilarity(LayoutEncoder(cells=3)), "letters": Letters()}
    return WeightedReward(parts, {"layout": 1.0, "letters": 0.5})


@pytest.fixture(scope="session")
def build(system, reward):
    """A module: SGD at rate 1, so that a step is the gradient."""
    from uae.models.finetune import Full
    from uae.module import UnifiedGRPO

    def build_module(**changes):
        arguments = {
            "system": system,
            "reward": reward,
            "finetune": Full(r"language_model"),
            "loss": GRPOLoss(),
            "sampling": Sampling(max_tokens=6),
            "group": 3,
            "optimizer": partial(torch.optim.SGD, lr=1.0),
        }
        return UnifiedGRPO(**{**arguments, **changes})

    return build_module


@pytest.fixture(scope="session")
def trainer(tmp_path_factory):
    def build_trainer(**changes):
        arguments = {
            "default_root_dir": tmp_path_factory.mktemp("run"),
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "inference_mode": False,
            "limit_val_batches": 0,
            "max_steps": 1,
        }
        return Trainer(**{**arguments, **changes})

    return build_trainer


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder laid out like the hub; also what UAE_CHECKPOINTS names while a test runs (see `mirrored`)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write(folder)
    return folder


@pytest.fixture
def mirrored(checkpoints, monkeypatch):
    monkeypatch.setenv("UAE_CHECKPOINTS", str(checkpoints))
    return checkpoints
