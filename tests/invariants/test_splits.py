"""One optimizer step is the same however its batch is split: into mini-batches, or over processes."""

from functools import partial
from itertools import islice

import pytest
import torch
from lightning.pytorch import Callback

from tests.two_processes import run_on_two
from uae.groups import Filtering
from uae.grpo import GRPOLoss
from uae.miniature.data import SceneData
from uae.rewards import BaseReward

DROPPING = Filtering(drop_flat_groups=True, drop_truncated=True)
VARIANTS = {
    "grpo": {"loss": GRPOLoss(beta=0.1)},
    "bnpo": {"loss": GRPOLoss(beta=0.1, aggregation="bnpo")},
    "dapo": {"loss": GRPOLoss(beta=0.1, aggregation="dapo")},
    "dr_grpo": {"loss": GRPOLoss(beta=0.1, aggregation="dr_grpo", max_tokens=6)},
    "sequence": {"loss": GRPOLoss(importance="sequence", aggregation="dapo")},
    "entropies": {"loss": GRPOLoss(top_entropy=0.4, entropy_bonus=0.1)},
    "grpo, filtered": {"loss": GRPOLoss(beta=0.1), "filtering": DROPPING},
    "dr_grpo, filtered": {"loss": GRPOLoss(beta=0.1, aggregation="dr_grpo", max_tokens=6), "filtering": DROPPING},
    "dapo, filtered": {"loss": GRPOLoss(beta=0.1, aggregation="dapo"), "filtering": DROPPING},
}


class Parity(BaseReward):
    """1 or 0, so that many groups of two are flat."""

    def __call__(self, sources_BCHW, reconstructions_NCHW, texts):
        return torch.tensor([float(sum(map(ord, text)) % 2) for text in texts]).view(len(sources_BCHW), -1)


def weights(module):
    return {name: p.detach().clone() for name, p in module.policy.named_parameters() if p.requires_grad}


def after_one_step(build, trainer, mini_batches, **variant):
    module = build(group=2, mini_batches=mini_batches, **variant)
    run = trainer(accumulate_grad_batches=mini_batches)
    run.fit(module, SceneData(batch_size=8, train_size=8))
    assert run.global_step == 1
    kept_R = module.experience.segments["caption"].kept_R
    assert kept_R is None or 0 < kept_R.sum() < len(kept_R)
    return weights(module)


@pytest.mark.parametrize("name", VARIANTS)
def test_mini_batches_with_accumulation(system, build, trainer, name):
    whole = after_one_step(build, trainer, 1, **VARIANTS[name])
    start = dict(system.build().captioner.learner.network.named_parameters())
    assert max((whole[name] - start[name]).abs().max() for name in whole) > 1e-2  # it moved
    for mini_batches in (2, 8):
        split = after_one_step(build, trainer, mini_batches, **VARIANTS[name])
        for parameter in whole:
            torch.testing.assert_close(split[parameter], whole[parameter], atol=1e-6, rtol=0, msg=lambda m: f"{name} {m}")


def test_windows_of_a_part_of_the_rollout(build, trainer):
    """Two steps of two mini-batches each, dapo: the first equals one step on the first half of the images."""
    module = build(**VARIANTS["dapo"], group=2, mini_batches=4)
    trainer(accumulate_grad_batches=2).fit(module, SceneData(batch_size=8, train_size=8))
    half = build(**VARIANTS["dapo"], group=2)

    class FirstHalf(SceneData):
        def on_after_batch_transfer(self, batch, index):
            return {key: value[:4] for key, value in batch.items()}

    trainer().fit(half, FirstHalf(batch_size=8, train_size=8))
    expected = weights(half)
    for name, found in weights(module).items():
        torch.testing.assert_close(found, expected[name], atol=1e-6, rtol=0)


DISTRIBUTED = {
    "grpo": {"loss": GRPOLoss(beta=0.1), "advantage_scale": "batch"},
    "dapo": {"loss": GRPOLoss(beta=0.1, aggregation="dapo"), "advantage_scale": "batch"},
    "filtered": {"loss": GRPOLoss(beta=0.1), "filtering": DROPPING},
    "drawn again": {"filtering": Filtering(rounds=2, drop_flat_groups=True)},
    "entropies": {"loss": GRPOLoss(top_entropy=0.4, entropy_bonus=0.1)},
    "parts by themselves": {"advantage_order": "normalize_then_sum"},
}


def fit_distributed(rank, variant, processes):
    from lightning.pytorch import Trainer

    from tests.conftest import Letters
    from tests.tiny_random import RandomTiny
    from uae.encoders import LayoutEncoder
    from uae.models.finetune import Full
    from uae.module import UnifiedGRPO
    from uae.rewards import EncoderSimilarity, WeightedReward
    from uae.types import Sampling

    parts = {"layout": EncoderSimilarity(LayoutEncoder(cells=3)), "letters": Letters()}
    if variant == "drawn again":
        parts = {"parity": Parity()}
    elif variant == "parts by themselves":  # pictures hardly differ, and a small std enlarges what another batch size rounds
        parts = {"letters": Letters(), "parity": Parity()}
    module = UnifiedGRPO(
        RandomTiny(),
        WeightedReward(parts, dict(zip(parts, (1.0, 0.5), strict=False))),
        Full("language_model"),
        sampling=Sampling(max_tokens=6),
        group=2,
        optimizer=partial(torch.optim.SGD, lr=1.0),
        **DISTRIBUTED[variant],
    )
    Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", logger=False, max_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, inference_mode=False, limit_val_batches=0,
        use_distributed_sampler=False, enable_model_summary=False,
    ).fit(module, SceneData(batch_size=8 // processes, train_size=8))  # fmt: skip
    segment = module.experience.segments["caption"]
    return weights(module), segment.mask_RS.sum(1).tolist(), module.experience.redrawn


def fit_all(rank, processes):
    return {variant: fit_distributed(rank, variant, processes) for variant in DISTRIBUTED}


def test_two_processes():
    whole, halves = fit_all(0, 1), run_on_two(fit_all, 2, timeout=240)
    for variant, (expected, lengths, redrawn) in whole.items():
        counts = [sum(half[variant][1]) for half in halves]
        assert sum(counts) == sum(lengths)
        assert counts[0] != counts[1]  # or dividing by the rank's own tokens would pass
        assert (0 in lengths) == (variant in ("filtered", "drawn again"))
        shares = [half[variant][2] for half in halves]
        assert sum(shares) / 2 == redrawn
        if variant == "drawn again":
            assert 0 < redrawn < 1
            assert shares[0] != shares[1]
        for half in halves:
            for name, found in half[variant][0].items():
                torch.testing.assert_close(found, expected[name], atol=1e-6, rtol=0, msg=lambda m, variant=variant: f"{variant}: {m}")


class WithoutLength(SceneData):
    """Scenes of which nobody knows how many there are; at most ``stop`` batches, with repetitions."""

    def __init__(self, stop=None, **arguments):
        super().__init__(**arguments)
        self.stop = stop

    def train_dataloader(self):
        loader, stop = super().train_dataloader(), self.stop

        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                return islice(loader, stop)

        return torch.utils.data.DataLoader(Stream(), batch_size=None)


CUT = {  # data and trainer in which an epoch is 2 batches long
    "end of the data": (SceneData(batch_size=4, train_size=8), {}),
    "limit_train_batches": (SceneData(batch_size=4, train_size=16), {"limit_train_batches": 2}),
    "unknown length": (WithoutLength(batch_size=4, train_size=8), {}),
}


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize("accumulate", [4, 8])
@pytest.mark.parametrize("cut", CUT)
def test_a_window_that_the_end_of_an_epoch_cuts_short(build, trainer, cut, accumulate):
    """The same two rollouts make the same step, whatever the window is that they do not fill."""
    data, options = CUT[cut]
    whole, short = build(group=2), build(group=2)
    trainer(accumulate_grad_batches=2, **options).fit(whole, data)
    run = trainer(accumulate_grad_batches=accumulate, **options)
    run.fit(short, data)
    assert run.global_step == 1
    expected = weights(whole)
    for name, found in weights(short).items():
        torch.testing.assert_close(found, expected[name], atol=1e-6, rtol=0)


def test_only_the_last_window_of_an_epoch_is_cut_short(build, trainer):
    """Three rollouts in windows of two: the last one makes the step that it would make alone."""
    short = build(group=2)
    run = trainer(accumulate_grad_batches=2, max_steps=-1, max_epochs=1)
    before = {}

    class Before(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            before[batch_idx] = weights(module)

        def on_before_optimizer_step(self, trainer, module, optimizer):
            parameters = dict(module.policy.named_parameters())
            self.gradient = {name: parameters[name].grad.clone() for name in before[0]}

    run.callbacks.append(step := Before())
    run.fit(short, SceneData(batch_size=4, train_size=12))
    assert run.global_step == 2
    parameters = {name: p for name, p in short.policy.named_parameters() if p.requires_grad}
    for name, parameter in parameters.items():
        parameter.data.copy_(before[2][name])
    segment = short.experience.segments["caption"]  # of the third rollout, whose gradient is taken by hand
    logp_RS = segment.logprobs()
    loss = GRPOLoss()(logp_RS, logp_RS.detach(), segment.advantage_R, segment.actions.mask_RS).loss
    for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
        torch.testing.assert_close(step.gradient[name], gradient, atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_data_of_unknown_length_must_not_end_inside_a_rollout(build, trainer):
    data = WithoutLength(batch_size=4, train_size=8, stop=3)
    with pytest.raises(RuntimeError, match=r"the data ended inside a rollout.*a multiple of.*=2"):
        trainer(max_steps=4).fit(build(mini_batches=2), data)
