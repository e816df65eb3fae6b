"""FSDP2: what is gathered, reduced and stored, and how it resumes. That it trains as DDP is in test_strategy_command."""

from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.collectives import Collectives
from tests.recorder import Recorder
from tests.tiny_random import RandomTiny
from tests.two_processes import run_on_two
from uae.grpo import GRPOLoss
from uae.miniature.data import SceneData
from uae.models.finetune import Full, LoRA
from uae.module import UnifiedGRPO
from uae.rewards import CaptionFormat, WeightedReward
from uae.strategy import FSDP2Strategy, refuse_other_sharding, unsharded
from uae.types import Sampling

LAYERS = 2


def module(finetune="full", mini_batches=1, optimizer=None, beta=0.05):
    return UnifiedGRPO(
        system=RandomTiny(LAYERS, spread=0.05),
        reward=WeightedReward({"format": CaptionFormat(r".*e.*")}, {"format": 1.0}),  # exact: nothing to round
        finetune=LoRA(rank=4) if finetune == "lora" else Full(r"^(?!.*visual\.)"),
        loss=GRPOLoss(beta=beta),
        sampling=Sampling(max_tokens=6),
        group=4,
        mini_batches=mini_batches,
        num_iterations=2,
        optimizer=optimizer or partial(torch.optim.SGD, lr=0.05),
    )


def trainer(strategy, folder, max_steps=4, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    devices = 1 if strategy == "auto" else 2
    options = {"enable_checkpointing": False, "limit_val_batches": 0, "inference_mode": False, **quiet, **options}
    return L.Trainer(accelerator="cpu", devices=devices, strategy=strategy, default_root_dir=folder, max_steps=max_steps, **options)


def run(strategy, folder, finetune, accumulate=1, ckpt_path=None, optimizer=None, callbacks=(), **options):
    recorder, model = Recorder(), module(finetune, mini_batches=accumulate, optimizer=optimizer)
    clip = 0.05 if accumulate > 1 else None
    fit = trainer(
        strategy,
        folder,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        callbacks=[recorder, *callbacks],
        **options,
    )
    fit.fit(model, SceneData(batch_size=4 if strategy == "auto" else 2, train_size=16), ckpt_path=ckpt_path)
    return recorder.result


def counting(rank, folder, accumulate, steps):
    """What one rollout gathers, what one optimizer step reduces, and the policy's number of sharded modules."""
    model = module("full", mini_batches=2, beta=0.0)
    collect, rollout = model._collect, Collectives()

    def counted(*args):
        with rollout:
            collect(*args)

    model._collect = counted
    with Collectives() as everything:
        fit = trainer("fsdp2", folder, max_steps=steps, accumulate_grad_batches=accumulate)
        fit.fit(model, SceneData(batch_size=2, train_size=16))
    assert model.experience.rollout.tokens_NT.shape[1] > 2
    groups = sum(isinstance(m, FSDPModule) for m in model.policy.modules())
    return rollout.counts["_allgather_base_"], everything.counts["_reduce_scatter_base_"] / steps, groups


def counting_both(rank, folder):
    return counting(rank, folder, accumulate=2, steps=2), counting(rank, folder, accumulate=4, steps=1)


def test_a_rollout_gathers_every_weight_once_and_a_window_reduces_as_often_as_half_of_it(tmp_path):
    for two, four in run_on_two(counting_both, str(tmp_path), timeout=300):
        gathers, reduces, groups = two
        assert groups == LAYERS + 2 + 1  # text layers, image blocks, root
        assert gathers == four[0] == groups
        assert reduces == four[1] > 0


def cutting_short(rank, folder):
    """Strategy to the weights after one step from an epoch of two batches, in windows of two and of four."""
    found = {}
    for strategy in ("ddp", "fsdp2"):
        for accumulate in (2, 4):
            recorder = Recorder()
            fit = trainer(strategy, folder, max_steps=1, accumulate_grad_batches=accumulate, callbacks=[recorder])
            fit.fit(module(), SceneData(batch_size=2, train_size=4))
            found[strategy, accumulate] = recorder.result["weights"]
    return found


def test_a_window_that_an_epoch_cuts_short_makes_the_step_of_a_full_one(tmp_path):
    for found in run_on_two(cutting_short, str(tmp_path), timeout=300):
        for strategy in ("ddp", "fsdp2"):
            torch.testing.assert_close(found[strategy, 4], found[strategy, 2], rtol=0, atol=1e-6)


MOMENTUM = partial(torch.optim.SGD, lr=0.05, momentum=0.9)  # a state, but none that magnifies rounding as Adam's does


def keeping(folder):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)


def options(folder, finetune):
    """Two optimizer steps per rollout, so that step 2 is between rollouts."""
    return {
        "folder": folder,
        "finetune": finetune,
        "accumulate": 2,
        "optimizer": MOMENTUM,
        "enable_checkpointing": True,
    }


def resume_shards(rank, folder):
    arguments = options(folder, "full")
    straight = run("fsdp2", callbacks=[keeping(folder)], **arguments)
    path = f"{folder}/step=2.ckpt"
    resumed = run("fsdp2", ckpt_path=path, **arguments)
    try:
        run("fsdp2", ckpt_path=path, **options(folder, "lora"))
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    return straight, resumed, refusal


def assert_continues(resumed, straight):
    torch.testing.assert_close(resumed["losses"], straight["losses"][2:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(resumed["norms"], straight["norms"][2:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(resumed["weights"], straight["weights"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_shards_hold_what_trains_and_resume_exactly(tmp_path):
    for straight, resumed, refusal in run_on_two(resume_shards, str(tmp_path), timeout=300):
        assert_continues(resumed, straight)
        assert "model.init_args.finetune" in refusal
    stored = FileSystemReader(tmp_path / "step=2.ckpt").read_metadata().state_dict_metadata
    assert {key.removeprefix("state_dict.") for key in stored if key.startswith("state_dict.")} == set(straight["weights"])
    assert not any("visual" in key or "lm_head" in key for key in stored)  # frozen; tied to what trains


def resume_file(rank, folder):
    arguments, file = options(folder, "lora"), FSDP2Strategy(save_distributed_checkpoint=False)
    straight = run(file, callbacks=[keeping(f"{folder}/fsdp2")], **arguments)
    run("ddp", callbacks=[keeping(f"{folder}/ddp")], **arguments)
    paths = {"fsdp2": f"{folder}/ddp/step=2.ckpt", "ddp": f"{folder}/fsdp2/step=2.ckpt"}
    return straight, [run(strategy, ckpt_path=path, **arguments) for strategy, path in paths.items()]


@pytest.mark.slow
def test_files_hold_what_trains_and_go_from_one_strategy_to_the_other(tmp_path):
    for straight, crossed in run_on_two(resume_file, str(tmp_path), timeout=300):
        for resumed in crossed:
            assert_continues(resumed, straight)
    stored = torch.load(tmp_path / "fsdp2" / "step=2.ckpt", weights_only=False)
    assert set(stored["state_dict"]) == set(straight["weights"])
    assert all("lora_" in name for name in stored["state_dict"])
    assert len(stored["optimizer_states"][0]["state"]) == len(straight["weights"])


def mixed(rank, folder):
    model, seen = module("lora"), {}
    model.ratio_tolerance, model.system = 0.2, HalfTiny()

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            trains = {name: p for name, p in module.named_parameters() if p.requires_grad}
            seen["kept"] = {p.dtype for p in trains.values()}
            seen["reduced"] = {p.grad.dtype for p in trains.values()}
            with unsharded(module.policy):
                seen["computed"] = {p.dtype for p in module.policy.parameters()}
                seen["sharded inside"] = {isinstance(p, DTensor) for p in module.policy.parameters()}
            seen["sharded after"] = {isinstance(p, DTensor) for p in module.policy.parameters()}
            seen["stores what trains"] = trainer.strategy.lightning_module_state_dict().keys() == trains.keys()

    fit = trainer(FSDP2Strategy(param_dtype="bfloat16"), folder, max_steps=1, callbacks=[Watch()])
    fit.fit(model, SceneData(batch_size=2, train_size=16))
    return seen


class HalfTiny(RandomTiny):
    def build(self):
        umm = super().build()
        umm.captioner.learner.network.to(torch.bfloat16)
        return umm


def test_bfloat16_gathers_keep_float32_masters(tmp_path):
    for seen in run_on_two(mixed, str(tmp_path), timeout=300):
        assert seen == {
            "kept": {torch.float32},
            "reduced": {torch.float32},
            "computed": {torch.bfloat16},
            "sharded inside": {False},
            "sharded after": {True},
            "stores what trains": True,  # not even the frozen head that is tied to the embedding
        }


def evaluate(rank, folder):
    """Evaluation of uneven shards, outside and inside a fit; then a fit with the default inference mode."""
    data = SceneData(batch_size=2, train_size=8, val_size=5, eval_batch_size=2)
    fit = trainer("fsdp2", folder, max_steps=2, limit_val_batches=1.0, num_sanity_val_steps=-1)
    fit.validate(module(), data)
    fit.fit(module(), data)
    with pytest.raises(ValueError, match="trainer.inference_mode"):
        trainer("fsdp2", folder, inference_mode=True).fit(module(), data)
    return fit.global_step


def test_evaluation_and_training_alternate(tmp_path):
    assert run_on_two(evaluate, str(tmp_path), timeout=300) == [2, 2]


def test_unsharded_leaves_an_ordinary_module_alone():
    ordinary = torch.nn.Linear(2, 2)
    with unsharded(ordinary):
        assert type(ordinary.weight) is torch.nn.Parameter


@pytest.mark.parametrize("strategy", [FSDPStrategy(), ModelParallelStrategy(), DeepSpeedStrategy.__new__(DeepSpeedStrategy)], ids=type)
def test_strategies_that_divide_otherwise_are_refused(strategy):
    with pytest.raises(ValueError, match=rf"trainer\.strategy is {type(strategy).__name__}; allowed: auto, ddp, fsdp2"):
        refuse_other_sharding(strategy)


def test_lightnings_own_default_is_refused_before_anything_is_built(tmp_path):
    fit = trainer(ModelParallelStrategy(), str(tmp_path))
    model = module()
    model.trainer = fit
    with pytest.raises(ValueError, match="ModelParallelStrategy; allowed"):
        model.setup("validate")
    refuse_other_sharding(FSDP2Strategy())
