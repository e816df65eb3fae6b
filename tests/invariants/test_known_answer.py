from functools import partial

import pytest
import torch
from lightning.pytorch import Callback

from tests.invariants import plain
from uae.grpo import GRPOLoss
from uae.miniature.data import SceneData
from uae.types import Sampling

RATE, BETA, EPSILON = 0.1, 0.3, 0.1


class Losses(Callback):
    def __init__(self):
        self.losses, self.fractions, self.images = [], [], None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.fractions.append(trainer.callback_metrics["policy/clip_fraction"].item())
        self.images = batch["image"]


def test_two_updates_equal_a_plain_loop(system, build, trainer):
    """Prefix sharing, padding, chunked log-probs, replay, buffer and Lightning together change nothing.

    The second update is off-policy, so the ratio, clipping and the KL to the start all count.
    """
    module = build(
        loss=GRPOLoss(beta=BETA, epsilon_low=EPSILON, epsilon_high=EPSILON),
        sampling=Sampling(max_tokens=6, temperature=0.8),
        num_iterations=2,
        optimizer=partial(torch.optim.SGD, lr=RATE),
    )
    seen = Losses()
    trainer(max_steps=2, callbacks=[seen]).fit(module, SceneData(batch_size=3, train_size=9))
    trainable = {name for name, p in module.policy.named_parameters() if p.requires_grad}
    assert len({*module.experience.rollout.mask_RS.sum(1).tolist()}) > 1  # captions of several lengths
    start = system.build().captioner
    losses, fractions, policy = plain.train(start, trainable, module.experience, seen.images, 2, RATE, BETA, EPSILON)
    assert seen.losses == pytest.approx(losses, abs=1e-5)
    assert seen.fractions == pytest.approx(fractions, abs=1e-6)
    assert fractions[1] > 0.05  # it did clip
    assert abs(losses[1] - losses[0]) > 1e-3
    for (name, expected), (_, begun) in zip(policy.named_parameters(), start.learner.network.named_parameters(), strict=True):
        found = module.policy.get_parameter(name)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert torch.equal(found, begun) == (name not in trainable)
