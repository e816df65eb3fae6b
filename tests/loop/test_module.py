import inspect
import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.loggers.logger import Logger

from tests.conftest import data
from uae.grpo import GRPOLoss
from uae.learner import Learner
from uae.miniature.data import SceneData
from uae.models.captioners.captioner import HFCaptioner
from uae.models.conditioners.states import HiddenStateConditioner, mlp_projector
from uae.models.finetune import Full, LoRA
from uae.module import UnifiedGRPO
from uae.rewards import BaseReward, WeightedReward
from uae.types import UMM, Sampling


class Recorded(Logger):
    """What a logger was given, one dict per call."""

    name, version = "recorded", 0

    def __init__(self):
        super().__init__()
        self.calls = []

    def log_metrics(self, metrics, step=None):
        self.calls.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        pass


def frozen_bytes(module):
    modules = [module.umm.conditioner, *module.umm.renderer.modules()]
    frozen = [t for part in modules for t in part.state_dict().values()]
    frozen += [p for p in module.policy.parameters() if not p.requires_grad]
    return [t.detach().contiguous().view(-1).view(torch.uint8).tolist() for t in frozen]


def test_training_step_fits_the_screen():
    assert len(inspect.getsource(UnifiedGRPO.training_step).splitlines()) <= 20


@pytest.mark.parametrize("finetune", [Full(), LoRA(rank=2)], ids=["full", "lora"])
def test_only_what_trains_changes_and_only_the_policy_is_registered(build, trainer, finetune):
    module = build(finetune=finetune, loss=GRPOLoss(beta=0.1))
    module.configure_model()
    before, umm = frozen_bytes(module), module.umm
    trained = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    run = trainer(max_steps=3)
    run.fit(module, data())
    assert module.umm is umm  # configured once
    assert frozen_bytes(module) == before
    assert len(before) > 30
    changed = {name for name, p in module.named_parameters() if name in trained and not torch.equal(p, trained[name])}
    assert any("q_proj" in name for name in changed)
    assert all(name.startswith("policy.") for name in [*module.state_dict(), *dict(module.named_parameters())])
    optimized = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in module.policy.parameters() if p.requires_grad}


@pytest.mark.parametrize("finetune", [Full(), LoRA(rank=2)], ids=["full", "lora"])
def test_first_mini_batch_has_ratio_one_and_no_kl(build, trainer, finetune):
    """Exactly: log-probs, their replay and the reference are the same computation, and LoRA starts as the base."""
    logger = Recorded()
    module = build(finetune=finetune, loss=GRPOLoss(beta=0.1), mini_batches=2)
    trainer(max_steps=2, logger=logger, log_every_n_steps=1).fit(module, data())
    first, second = (metrics for _, metrics in logger.calls)
    assert (first["policy/ratio_max"], first["policy/kl"], first["policy/clip_fraction"]) == (1.0, 0.0, 0.0)
    assert first["policy/ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert first["policy/sampler_gap"] < 1e-5
    assert second["policy/kl"] > 0  # after the first update


class KL(Callback):
    """k3 per token, by a plain loop, of the weights that the second pass starts with."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 1:
            experience = module.experience
            with torch.no_grad():
                logp_NT = module.umm.captioner.logprobs(experience.rollout)
            columns = (experience.segments["caption"].reference_logp_RS, logp_NT, experience.rollout.mask_RS)
            rows = zip(*(column.double().flatten().tolist() for column in columns), strict=True)
            d = [reference - logp for reference, logp, mask in rows if mask]
            self.k3 = sum(math.exp(x) - x - 1 for x in d) / len(d)


def test_kl_is_logged_per_token_whatever_the_loss_aggregates(build, trainer):
    logger, kl = Recorded(), KL()
    loss = GRPOLoss(beta=0.1, kl="k2", aggregation="dr_grpo", max_tokens=1000)
    optimizer = partial(torch.optim.SGD, lr=20.0)
    module = build(loss=loss, num_iterations=2, optimizer=optimizer)
    trainer(max_steps=2, logger=logger, log_every_n_steps=1, callbacks=[kl]).fit(module, data())
    assert kl.k3 > 1e-5
    assert logger.calls[1][1]["policy/kl"] == pytest.approx(kl.k3, rel=1e-2)


def test_without_kl_there_is_no_reference(build, trainer, monkeypatch):
    monkeypatch.setattr(Learner, "reference", lambda self: pytest.fail("the reference was used"))
    for finetune in (Full(), LoRA(rank=2)):
        module = build(finetune=finetune)
        trainer(max_steps=2).fit(module, data())
        assert len(module.umm.captioner.learner.roots()) == 1
        assert module.experience.segments["caption"].reference_logp_RS is None
        assert "reference" not in module.experience.seconds


@pytest.mark.parametrize(
    ("mini_batches", "iterations", "accumulate", "replays"), [(1, 1, 1, 0), (2, 1, 1, 1), (2, 1, 2, 0), (2, 2, 1, 1), (4, 2, 2, 2)]
)
def test_old_log_probs_are_replayed_only_after_an_optimizer_step(
    build, trainer, monkeypatch, mini_batches, iterations, accumulate, replays
):
    """And to the byte, nothing else changes: the first pass of a mini-batch computes them under the same weights."""
    from uae import module as module_file

    passes, split, logprobs = [], module_file.split, HFCaptioner.logprobs
    monkeypatch.setattr(HFCaptioner, "logprobs", lambda *a: passes.append(torch.is_grad_enabled()) or logprobs(*a))

    def train():
        passes.clear()
        module = build(mini_batches=mini_batches, num_iterations=iterations, loss=GRPOLoss(epsilon_low=0.01, epsilon_high=0.01))
        steps = 2 * mini_batches * iterations // accumulate
        trainer(max_steps=steps, accumulate_grad_batches=accumulate).fit(module, data())
        return passes.count(False), {name: p.detach() for name, p in module.policy.named_parameters() if p.requires_grad}

    few, own = train()
    monkeypatch.setattr(module_file, "split", lambda experience, count, on_policy: split(experience, count))
    many, replayed = train()
    assert (few, many) == (2 * replays, 2 * mini_batches)
    assert own.keys() == replayed.keys()
    assert all(torch.equal(own[name], replayed[name]) for name in own)


def test_reference_runs_once_per_rollout(build, trainer, monkeypatch):
    calls, honest = [], Learner.reference
    monkeypatch.setattr(Learner, "reference", lambda self: calls.append(1) or honest(self))
    trainer(max_steps=8).fit(build(loss=GRPOLoss(beta=0.1), mini_batches=2, num_iterations=2), data())
    assert len(calls) == 2


@pytest.mark.parametrize(("accumulate", "steps", "expected"), [(1, 8, [0, 1]), (2, 6, [0, 1, 2]), (8, 2, [0, 1, 2, 3])])
def test_rollouts_are_numbered_from_the_start_of_the_run(build, trainer, monkeypatch, accumulate, steps, expected):
    from uae import module as module_file

    seen, honest = [], module_file.roll_out
    monkeypatch.setattr(module_file, "roll_out", lambda *a: seen.append(a[4]) or honest(*a))
    module = build(mini_batches=2, num_iterations=2)
    trainer(max_steps=steps, accumulate_grad_batches=accumulate).fit(module, data(train_size=8))  # epochs of two rollouts
    assert seen == expected


def test_every_tag_is_logged_and_means_what_it_says(build, trainer):
    logger = Recorded()
    module = build(mini_batches=2, loss=GRPOLoss(beta=0.1), sampling=Sampling(max_tokens=4))
    trainer(logger=logger, log_every_n_steps=1, accumulate_grad_batches=2).fit(module, data())
    (_, logged), experience = logger.calls[-1], module.experience
    rollout, rewards = experience.rollout, experience.rewards.reward_BG.double()
    lengths = [sum(row) for row in rollout.mask_RS.tolist()]
    entropies = rollout.entropy_RS[rollout.mask_RS.bool()].tolist()
    advantages = experience.advantage_BG.flatten().tolist()
    last = module._mini_batches[-1]["caption"]
    old, sampled = (x.double().flatten().tolist() for x in (last.old_logp_RS, last.actions.logp_RS))
    expected = {
        "caption/length": sum(lengths) / 12,
        "condition/truncated": 0,
        "caption/finished": sum(length < 4 for length in lengths) / 12,
        "policy/entropy": sum(entropies) / len(entropies),
        "reward/mean": rewards.mean().item(),
        "reward/std": sum(group.std().item() for group in rewards) / 4,
        "reward/letters": experience.rewards.parts["letters"].mean().item(),
        "reward/layout": experience.rewards.parts["layout"].mean().item(),
        "reward/zero_variance": 0.0,
        "advantage/max_abs": max(map(abs, advantages)),
        "advantage/std": torch.tensor(advantages).std().item(),
        "reconstruction/brightness": experience.reconstructions_NCHW.mean().item(),
        "policy/sampler_gap": max(abs(math.exp(a - b) - 1) for a, b in zip(old, sampled, strict=True)),
        **{f"time/{stage}": seconds for stage, seconds in experience.seconds.items()},
        "speed/tokens_per_second": sum(lengths) / experience.seconds["caption"],
        "speed/images_per_second": 12 / experience.seconds["render"],
    }
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    stages = {"caption", "condition", "render", "reward", "reference", "update"}
    assert {name for name in logged if name.startswith("time/")} == {f"time/{stage}" for stage in stages}
    rest = {
        "policy/loss",
        "policy/kl",
        "policy/clip_fraction",
        "policy/ratio_mean",
        "policy/ratio_max",
        "time/update",
        "epoch",
    }
    assert set(logged) == {*expected, *rest}


class HalfConstant(BaseReward):
    """The letters for the first half of the images, a constant for the others; one caption is not scored."""

    def __call__(self, sources_BCHW, reconstructions_NCHW, texts):
        reward_BG = torch.arange(float(len(texts))).view(len(sources_BCHW), -1)
        reward_BG[len(reward_BG) // 2 :] = 0.3
        reward_BG[0, 0] = torch.nan
        return reward_BG


def test_groups_without_variance_are_counted_and_teach_nothing(build, trainer):
    run = trainer()
    module = build(reward=WeightedReward({"half": HalfConstant()}, {"half": 1.0}))
    run.fit(module, data())
    assert run.callback_metrics["reward/zero_variance"] == 0.5
    assert module.experience.advantage_BG[2:].abs().max() == 0
    assert module.experience.advantage_BG[0, 0] == 0
    assert run.callback_metrics["reward/mean"].item() == pytest.approx((1 + 2 + 3 + 4 + 5 + 6 * 0.3) / 11, rel=1e-5)
    assert all(p.isfinite().all() for p in module.policy.parameters())


def test_guard_fires_when_sampler_and_training_disagree(build, trainer, monkeypatch):
    from uae.models.captioners.captioner import HFCaptioner

    honest = HFCaptioner.logprobs
    monkeypatch.setattr(HFCaptioner, "logprobs", lambda self, rollout: honest(self, rollout) + 0.01)
    with pytest.raises(RuntimeError, match=r"off by 0\.0101; allowed: model\.init_args\.ratio_tolerance=0\.001"):
        trainer().fit(build(), data())
    module = build(ratio_tolerance=0.02)
    trainer().fit(module, data())
    module.ratio_tolerance = 1e-3
    with pytest.raises(RuntimeError, match="off by"):  # a new run of the same module is guarded again
        trainer().fit(module, data())


def test_a_conditioner_may_share_the_policys_weights(build, trainer, system):
    class Shared:
        def build(self):
            umm = system.build()
            model = umm.captioner.learner.network.base.model.language_model
            conditioner = HiddenStateConditioner(model, umm.captioner.processor.tokenizer, mlp_projector(128, 64, 32), "{caption} a")
            return UMM(umm.captioner, conditioner, umm.renderer)

    plain, module = build(), build(system=Shared())
    plain.configure_model()
    trainer(max_steps=2).fit(module, data())
    assert set(module.state_dict()) == set(plain.state_dict())
    shared = dict(module.umm.conditioner.language_model.named_parameters())
    assert all(p is module.policy.get_parameter(f"model.model.language_model.{name}") for name, p in shared.items())
    assert not torch.equal(shared["norm.weight"], plain.policy.base.model.language_model.norm.weight)
    assert not any(p.requires_grad and p.grad is not None for p in module.umm.conditioner.projector.parameters())


def test_the_adapters_start_depends_on_the_runs_seed_only(build):
    starts = []
    for state, seed in ((1, 0), (2, 0), (1, 3)):
        module = build(finetune=LoRA(rank=2), seed=seed)
        torch.manual_seed(state)
        module.configure_model()
        expected = torch.Generator().manual_seed(state)
        assert torch.equal(torch.rand(2), torch.rand(2, generator=expected))  # and leaves the global state alone
        starts.append(next(p for name, p in module.named_parameters() if "lora_A" in name))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": 1}, r"model\.init_args\.group=1; allowed: 2 or more"),
        ({"mini_batches": 0}, r"model\.init_args\.mini_batches=0"),
        ({"num_iterations": 0}, r"model\.init_args\.num_iterations=0"),
        ({"sampling": Sampling(temperature=0.0)}, r"model\.init_args\.sampling\.temperature=0"),
    ],
)
def test_impossible_settings_are_refused_at_once(build, changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


DAPO = GRPOLoss(aggregation="dapo")


@pytest.mark.parametrize(
    ("module_changes", "trainer_changes", "message"),
    [
        ({"mini_batches": 3}, {}, r"4 images.*model\.init_args\.mini_batches=3"),
        ({"mini_batches": 4}, {"accumulate_grad_batches": 3}, "one must divide the other"),
        ({"loss": DAPO}, {"accumulate_grad_batches": 2}, r"aggregation=dapo.*spans 2 rollouts"),
        ({"mini_batches": 2}, {"limit_train_batches": 3}, "ends inside a rollout.* trainer.limit_train_batches=2$"),
        ({"mini_batches": 2}, {"overfit_batches": 1}, "ends inside a rollout.* trainer.overfit_batches=2$"),
    ],
)
def test_runs_that_cannot_be_right_are_refused(build, trainer, module_changes, trainer_changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(**trainer_changes).fit(build(**module_changes), data())


def test_a_dry_run_of_one_batch_may_end_inside_a_rollout(build, trainer):
    dry = trainer(fast_dev_run=True)
    dry.fit(build(mini_batches=2), data())
    assert dry.global_step == 1


def test_a_batch_that_changes_within_a_rollout_is_refused(build, trainer):
    class Unrepeated(SceneData):
        def train_dataloader(self):
            attached, self.trainer = self.trainer, None
            try:
                return super().train_dataloader()
            finally:
                self.trainer = attached

    with pytest.raises(RuntimeError, match="the batch changed within a rollout"):
        trainer(max_steps=4).fit(build(mini_batches=2), Unrepeated(batch_size=4, train_size=16))


@pytest.mark.parametrize(("accumulate", "expected"), [(1, [1, 3, 5]), (2, [1, 3, 5]), (4, [3, 5])])
def test_a_boundary_needs_the_whole_rollout_and_the_optimizer_step(build, trainer, accumulate, expected):
    class Boundaries(Callback):
        def __init__(self):
            self.found = []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.found += [batch_idx] * module.at_rollout_boundary

    seen = Boundaries()
    run = trainer(max_steps=-1, max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[seen])
    run.fit(build(mini_batches=2), data(train_size=12))  # three rollouts; the epoch's end completes the last window
    assert seen.found == expected


class OtherData(LightningDataModule):
    """A data module that is none of `uae.data`, with batches of four."""

    batch_size = 4

    def train_dataloader(self):
        return pytest.fail("the size of the batches was known before")


def test_batches_of_any_data_module_must_divide(build, trainer):
    with pytest.raises(ValueError, match=r"4 images.*model\.init_args\.mini_batches=3"):
        trainer().fit(build(mini_batches=3), OtherData())
