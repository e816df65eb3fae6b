"""A worked example: a captioner that is no model of any library, and the system that has it, used by its class path.

A new captioner is one file with these two classes and a configuration that names the system. It says the same five words of
any image; which words they are is learnt from the reward.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from uae import cli
from uae.learner import Learner, Network
from uae.miniature.tiny import WEIGHTS, load_decoder
from uae.models.captioners.draws import draw, entropy, uniforms
from uae.types import UMM, Rollout

ROOT = Path(__file__).parents[2]
WORDS = ["a", "red", "blue", "square", "ring"]


@dataclass(frozen=True)
class Images:
    """The context of B images, of which this captioner reads the number only."""

    count: int

    def __len__(self):
        return self.count

    def index(self, images):
        return Images(len(images))


class Table(nn.Module):
    """Logits of a word at each of five places."""

    def __init__(self):
        super().__init__()
        self.logits_TV = nn.Parameter(torch.zeros(5, len(WORDS)))


class TableCaptioner:
    """Implements `uae.types.Captioner`."""

    def __init__(self):
        self.learner = Learner(Network(Table()))

    def to(self, device):
        self.learner.to(device)
        return self

    def prepare(self, images_BCHW, instruction=None):
        return Images(len(images_BCHW))

    @torch.no_grad()
    def sample(self, context, group, sampling, seeds):
        logp_TV = self._logp(sampling.policy_temperature)
        if sampling.temperature == 0:
            tokens_NT = logp_TV.argmax(-1).expand(len(seeds), -1)
        else:
            uniform_NT = uniforms(seeds, len(logp_TV))
            tokens_NT = torch.stack([draw(logp_TV, uniform_T) for uniform_T in uniform_NT])
        return Rollout(
            mask_RS=torch.ones(tokens_NT.shape),
            logp_RS=logp_TV.expand(len(tokens_NT), -1, -1).gather(2, tokens_NT[..., None])[..., 0],
            entropy_RS=entropy(logp_TV).expand(len(tokens_NT), -1),
            tokens_NT=tokens_NT,
            texts=[" ".join(WORDS[word] for word in row) for row in tokens_NT.tolist()],
            context=context,
            group=group,
            temperature=sampling.policy_temperature,
        )

    def logprobs(self, rollout):
        logp_TV = self._logp(rollout.temperature)
        return logp_TV.expand(len(rollout), -1, -1).gather(2, rollout.tokens_NT[..., None])[..., 0]

    def _logp(self, temperature):
        return (self.learner.network.base.logits_TV / temperature).log_softmax(-1)


class TableSystem:
    """Implements `uae.types.System`: that captioner before the decoder of the miniature."""

    def build(self) -> UMM:
        conditioner, renderer = load_decoder(WEIGHTS / "decoder", steps=2, guidance=1.0)
        return UMM(TableCaptioner(), conditioner, renderer)


def test_a_captioner_of_ones_own_is_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["uae"])
    words = [f"--config={ROOT / file}" for file in ("configs/tiny.yaml", "configs/debug/fast.yaml")]
    words += [
        "--model.init_args.system.class_path=tests.models.test_toy_captioner.TableSystem",
        "--model.init_args.finetune.class_path=uae.models.finetune.Full",
        "--model.init_args.ratio_tolerance=1e-6",
        "--trainer.max_steps=2",
    ]
    run = cli.main(["fit", *words])
    logged, policy = run.trainer.callback_metrics, run.model.policy
    assert logged["policy/sampler_gap"] == 0  # sampler and log-probs are the same function
    assert logged["caption/length"] == 5
    assert torch.isfinite(logged["reward/clip"])
    assert policy.base.logits_TV.abs().max() > 0  # the reward moved the table
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["state_dict"].keys() == {"policy.model.logits_TV"}
    (export,) = tmp_path.rglob("export/model.safetensors")
    assert torch.equal(load_file(export)["logits_TV"], policy.base.logits_TV)
