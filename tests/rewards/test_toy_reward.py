"""A worked example: a new reward in one class, used by its class path beside another one."""

from pathlib import Path

import torch

from uae import cli
from uae.rewards import BaseReward

ROOT = Path(__file__).parents[2]


class Brevity(BaseReward):
    """1 for a caption of one word, 1/2 for two words, and so on.

    Args:
        scale: Number that the reward is multiplied by.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, sources_BCHW, reconstructions_NCHW, texts):
        rewards = [self.scale / max(1, len(text.split())) for text in texts]
        return torch.tensor(rewards).view(len(sources_BCHW), -1)


DELTA = """
model:
  init_args:
    reward:
      init_args:
        parts:
          layout:
            class_path: uae.rewards.EncoderSimilarity
            init_args:
              encoder:
                class_path: uae.encoders.LayoutEncoder
          brevity:
            class_path: tests.rewards.test_toy_reward.Brevity
            init_args:
              scale: 2.0
        weights:
          layout: 1.0
          brevity: 0.5
"""


def test_a_run_trains_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["uae"])
    (tmp_path / "brevity.yaml").write_text(DELTA)
    files = [ROOT / "configs/tiny.yaml", ROOT / "configs/debug/fast.yaml", ROOT / "tests/untrained.yaml", "brevity.yaml"]
    run = cli.main(["fit", *(f"--config={file}" for file in files), "--trainer.max_steps=2"])
    logged = {name: float(value) for name, value in run.trainer.callback_metrics.items()}
    assert 0 < logged["reward/brevity"] <= 2
    parts = logged["reward/layout"] + 0.5 * logged["reward/brevity"]
    assert abs(logged["reward/mean"] - parts) < 1e-5
