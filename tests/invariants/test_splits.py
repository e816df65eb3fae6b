"""One optimizer step is the same however its batch is split: into mini-batches, or over processes."""

from functools import partial

import pytest
import torch

from tests.two_processes import run_on_two
from uae.grpo import GRPOLoss
from uae.miniature.data import SceneData

LOSSES = {
    "grpo": GRPOLoss(beta=0.1),
    "bnpo": GRPOLoss(beta=0.1, aggregation="bnpo"),
    "dapo": GRPOLoss(beta=0.1, aggregation="dapo"),
    "dr_grpo": GRPOLoss(beta=0.1, aggregation="dr_grpo", max_tokens=6),
    "sequence": GRPOLoss(importance="sequence", aggregation="dapo"),
}


def weights(module):
    return {name: p.detach().clone() for name, p in module.policy.named_parameters() if p.requires_grad}


def after_one_step(build, trainer, mini_batches, loss):
    module = build(loss=loss, group=2, mini_batches=mini_batches)
    run = trainer(accumulate_grad_batches=mini_batches)
    run.fit(module, SceneData(batch_size=8, train_size=8))
    assert run.global_step == 1
    return weights(module)


@pytest.mark.parametrize("name", LOSSES)
def test_mini_batches_with_accumulation(system, build, trainer, name):
    whole = after_one_step(build, trainer, 1, LOSSES[name])
    start = dict(system.build().captioner.learner.network.named_parameters())
    assert max((whole[name] - start[name]).abs().max() for name in whole) > 1e-2  # it moved
    for mini_batches in (2, 8):
        split = after_one_step(build, trainer, mini_batches, LOSSES[name])
        for parameter in whole:
            torch.testing.assert_close(
                split[parameter], whole[parameter], atol=1e-6, rtol=0, msg=lambda m: f"{name} {m}"
            )


def test_windows_of_a_part_of_the_rollout(build, trainer):
    """Two steps of two mini-batches each, dapo: the first equals one step on the first half of the images."""
    module = build(loss=LOSSES["dapo"], group=2, mini_batches=4)
    trainer(accumulate_grad_batches=2).fit(module, SceneData(batch_size=8, train_size=8))
    half = build(loss=LOSSES["dapo"], group=2)

    class FirstHalf(SceneData):
        def on_after_batch_transfer(self, batch, index):
            return {key: value[:4] for key, value in batch.items()}

    trainer().fit(half, FirstHalf(batch_size=8, train_size=8))
    expected = weights(half)
    for name, found in weights(module).items():
        torch.testing.assert_close(found, expected[name], atol=1e-6, rtol=0)


def fit_distributed(rank, aggregation, processes):
    from lightning.pytorch import Trainer

    from tests.conftest import Letters
    from tests.tiny_random import RandomTiny
    from uae.encoders import LayoutEncoder
    from uae.models.finetune import Full
    from uae.module import UnifiedGRPO
    from uae.rewards import EncoderSimilarity, WeightedReward
    from uae.types import Sampling

    module = UnifiedGRPO(
        RandomTiny(),
        WeightedReward(
            {"layout": EncoderSimilarity(LayoutEncoder(cells=3)), "letters": Letters()}, {"layout": 1.0, "letters": 0.5}
        ),
        Full("language_model"),
        GRPOLoss(aggregation=aggregation, max_tokens=6, beta=0.1),
        Sampling(max_tokens=6),
        group=2,
        advantage_scale="batch",
        optimizer=partial(torch.optim.SGD, lr=1.0),
    )
    Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", logger=False, max_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, inference_mode=False, limit_val_batches=0,
        use_distributed_sampler=False, enable_model_summary=False,
    ).fit(module, SceneData(batch_size=8 // processes, train_size=8))  # fmt: skip
    return weights(module), module.experience.rollout.mask_RS.sum(1).tolist()


def fit_both(rank, processes):
    return {aggregation: fit_distributed(rank, aggregation, processes) for aggregation in ("grpo", "dapo")}


def test_two_processes():
    whole, halves = fit_both(0, 1), run_on_two(fit_both, 2, timeout=180)
    for aggregation, (expected, lengths) in whole.items():
        counts = [sum(half[aggregation][1]) for half in halves]
        assert sum(counts) == sum(lengths)
        assert counts[0] != counts[1]  # or dividing by the rank's own tokens would pass
        for half in halves:
            for name, found in half[aggregation][0].items():
                torch.testing.assert_close(found, expected[name], atol=1e-6, rtol=0)
