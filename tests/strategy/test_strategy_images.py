"""Images that train, under FSDP2, under DDP and in one process with twice the batch: the same run.

Image tokens are actions of the captioner's own root, which then runs twice before one backward pass; a diffusion
renderer is a second root.
"""

from functools import partial

import pytest
import torch

from tests.strategy.test_strategy import Recorder, trainer
from tests.tiny_random import RandomTiny
from tests.two_processes import run_on_two
from uae.grpo import GRPOLoss
from uae.miniature import tiny_janus
from uae.miniature.data import SceneData
from uae.models.finetune import Full, LoRA
from uae.models.flow.policy import Exploration
from uae.models.tokens.policy import TokenSampling
from uae.module import UnifiedGRPO
from uae.rewards import WeightedReward
from uae.rewards.base import BaseReward, batch_and_group
from uae.types import Sampling

STEPS = 3


class RandomJanus:
    """The miniature of UMM-2 with random weights that are neither uniform nor certain."""

    def build(self):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = tiny_janus.create(width=32, layers=2)
        model.get_input_embeddings().weight.data.mul_(3)
        umm = tiny_janus.assemble(model.eval(), tiny_janus.processor(), TokenSampling(5.0))
        umm.captioner.end_ids += range(12, 22)  # random weights rarely end a caption
        return umm


class Brightness(BaseReward):
    """Of an image, and of the text that it came from: every caption and every reconstruction is worth something else."""

    def __call__(self, sources_BCHW, reconstructions_NCHW, texts):
        B, G = batch_and_group(sources_BCHW, reconstructions_NCHW, texts)
        letters = torch.tensor([text.count("e") for text in texts], dtype=torch.float32)
        return (10 * reconstructions_NCHW.mean((1, 2, 3)) + letters).view(B, G)


class Losses(Recorder):
    """Of all segments."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        seen = trainer.callback_metrics
        self.losses.append({name: seen[name].item() for name in ("policy/loss", "image_policy/loss") if name in seen})


def finetuned(name):
    return LoRA(rank=4) if name == "lora" else Full()


def module(system, finetune, train, image_finetune=None):
    flow = system == "flow"
    return UnifiedGRPO(
        system=RandomTiny(2, denoising_steps=3, spread=0.05) if flow else RandomJanus(),
        reward=WeightedReward({"brightness": Brightness()}, {"brightness": 1.0}),
        finetune=finetuned(finetune),
        image_finetune=finetuned(image_finetune) if flow else None,
        exploration=Exploration() if flow else None,
        image_weight=3000.0 if flow else 30.0,  # random weights hardly draw: their gradient would go unseen
        loss=GRPOLoss(beta=0.05),
        image_loss=GRPOLoss(1e-3, 1e-3, beta=0.05) if flow else None,
        sampling=Sampling(max_tokens=6),
        group=2,
        train=train,
        reconstructions=2,
        advantage_scale="batch",  # of all processes
        num_iterations=2,
        optimizer=partial(torch.optim.SGD, lr=0.05),
    )


SCENARIOS = [
    ("tokens", "full", "both"),
    ("tokens", "lora", "both"),
    ("tokens", "full", "images"),
    ("flow", "full", "both", "full"),
    ("flow", "lora", "both", "lora"),
    ("flow", "lora", "images", "full"),
]


def run(strategy, folder, scenario):
    recorder = Losses()
    fit = trainer(strategy, folder, max_steps=STEPS, callbacks=[recorder])
    fit.fit(module(*scenario), SceneData(batch_size=4 if strategy == "auto" else 2, train_size=16))
    return recorder.result


def run_all(rank, strategy, folder):
    return {scenario: run(strategy, folder, scenario) for scenario in SCENARIOS}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs"))
    results = {"one": run_all(0, "auto", folder)}
    for strategy in ("ddp", "fsdp2"):
        first, second = run_on_two(run_all, strategy, folder, timeout=300)
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        results[strategy] = first
    return results


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_images_as_one(runs, strategy, scenario):
    one, two = runs["one"][scenario], runs[strategy][scenario]
    learning = {"both": {"policy/loss", "image_policy/loss"}, "images": {"image_policy/loss"}}[scenario[2]]
    assert [set(losses) for losses in one["losses"]] == [learning] * STEPS
    for name in learning:  # off-policy and with a KL, or the losses would be zero
        assert max(abs(losses[name]) for losses in one["losses"]) > 1e-6  # steps: nats per latent dimension
    assert min(one["norms"]) > 0.1
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
