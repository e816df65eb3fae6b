"""A worked example: a variant of the loss in one class, used by its class path."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from uae import cli
from uae.grpo import GRPOLoss

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class WithoutRatio(GRPOLoss):
    """REINFORCE: the gradient of ``-A * logp``, however far the policy has moved since it sampled."""

    def ratio(self, log_ratio_NT, valid_NT):
        return (log_ratio_NT - log_ratio_NT.detach()).exp()  # 1, with the gradient of logp


def test_the_gradient_is_that_of_reinforce():
    logp = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]], requires_grad=True)
    advantages = torch.tensor([2.0, -1.0])
    WithoutRatio()(logp, logp.detach() + 5, advantages, torch.ones(2, 2)).loss.backward()
    torch.testing.assert_close(logp.grad, torch.tensor([[-0.5, -0.5], [0.25, 0.25]]))  # -A / (N * T)


def test_a_run_trains_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["uae"])
    files = [ROOT / "configs/tiny.yaml", ROOT / "configs/debug/fast.yaml", ROOT / "tests/untrained.yaml"]
    loss = ["--model.init_args.loss.class_path=tests.grpo.test_toy_loss.WithoutRatio", "--trainer.max_steps=2"]
    run = cli.main(["fit", *(f"--config={file}" for file in files), *loss])
    assert type(run.model.losses["caption"]).__name__ == "WithoutRatio"
    assert run.trainer.callback_metrics["policy/ratio_max"] == pytest.approx(1.0)
