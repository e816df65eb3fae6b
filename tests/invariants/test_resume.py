import random

import numpy
import pytest
import torch
from lightning.pytorch import Callback

from callbacks.checkpoint import RolloutCheckpoint
from uae.checkpoints.files import CheckpointFiles
from uae.grpo import GRPOLoss
from uae.miniature.data import SceneData
from uae.models.finetune import Full, LoRA

WARMUP = {"scheduler": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 10)}


class Save(Callback):
    """Saves after some optimizer steps, and notes which were rollout boundaries."""

    def __init__(self, folder, steps=()):
        self.folder, self.steps, self.boundaries = folder, steps, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if module.at_rollout_boundary:
            self.boundaries.append(trainer.global_step)
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def module_of(build, **changes):
    adam = lambda parameters: torch.optim.AdamW(parameters, lr=0.01)  # noqa: E731
    settings = {"mini_batches": 2, "num_iterations": 2, "loss": GRPOLoss(beta=0.1), "finetune": LoRA(rank=2), **WARMUP}
    return build(**{**settings, "optimizer": adam, **changes})


def fit(module, trainer, save, resume=None):
    torch.manual_seed(len(str(resume)))  # global state must not matter
    data = SceneData(batch_size=4, train_size=8)  # two rollouts of four steps per epoch
    trainer(max_steps=16, callbacks=[save]).fit(module, data, ckpt_path=resume)
    return module


@pytest.fixture(scope="module")
def straight(build, trainer, tmp_path_factory):
    save = Save(tmp_path_factory.mktemp("straight"), steps=(4, 6, 8))
    return fit(module_of(build), trainer, save), save


@pytest.mark.parametrize("at", [4, 8])  # inside an epoch, and between two
def test_resumed_at_a_rollout_boundary_is_uninterrupted(build, trainer, straight, at):
    module, saved = straight
    assert saved.boundaries == [4, 8, 12, 16]
    save = Save(saved.folder)
    resumed = fit(module_of(build), trainer, save, resume=saved.folder / f"{at}.ckpt")
    assert save.boundaries == [step for step in saved.boundaries if step > at]
    assert resumed.experience.rollout.texts == module.experience.rollout.texts
    begun = module_of(build)
    begun.configure_model()
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name))
        assert torch.equal(parameter, begun.get_parameter(name)) == (not parameter.requires_grad)


class Global(Callback):
    """The state of every global stream of random numbers, batch by batch."""

    def __init__(self):
        self.states = []

    def note(self, *_):
        self.states.append((torch.get_rng_state().tolist(), random.getstate(), repr(numpy.random.get_state())))

    on_train_start = on_train_batch_end = note


@pytest.mark.parametrize("finetune", [LoRA(rank=2), Full()], ids=["lora", "full"])
def test_training_draws_from_no_global_stream(build, trainer, finetune):
    """Every number comes from (seed, image, step), so a resumed process on any rank lacks no state."""
    seen = Global()
    data = SceneData(batch_size=4, train_size=8)
    trainer(max_steps=9, callbacks=[seen]).fit(module_of(build, finetune=finetune), data)  # two epochs
    assert len(seen.states) == 10
    assert all(state == seen.states[0] for state in seen.states)


@pytest.mark.parametrize("steps", [8, 12])  # the end of an epoch, and of a run inside an epoch
@pytest.mark.parametrize("on_train_epoch_end", [True, False])
def test_checkpoints_by_epoch_resume_exactly(build, trainer, straight, tmp_path, steps, on_train_epoch_end):
    checkpoint = RolloutCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=on_train_epoch_end
    )
    validating = {"limit_val_batches": 1, "val_check_interval": 4, "check_val_every_n_epoch": None}
    settings = {"plugins": [CheckpointFiles()], "num_sanity_val_steps": 0, **validating}
    data = SceneData(batch_size=4, train_size=8, val_size=2)
    run = trainer(max_steps=steps, callbacks=[checkpoint], enable_checkpointing=True, **settings)
    run.fit(module_of(build), data)
    resumed = module_of(build)
    trainer(max_steps=16, **settings).fit(resumed, data, ckpt_path=tmp_path / f"step={steps}.ckpt")
    for name, parameter in straight[0].named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name))


def test_a_run_that_goes_on_inside_a_rollout_draws_it_again_and_says_so(build, trainer, straight):
    module, saved = straight
    with pytest.warns(UserWarning, match="the run continues inside a rollout, at step 6: its captions are drawn again"):
        resumed = fit(module_of(build), trainer, Save(saved.folder), resume=saved.folder / "6.ckpt")
    assert resumed.global_step == 16
    assert torch.equal(resumed.experience.id_B, module.experience.id_B)  # the same images, from other weights


def test_a_checkpoint_holds_what_trains_and_nothing_else_fits_it(build, trainer, straight):
    module, saved = straight
    content = torch.load(saved.folder / "8.ckpt", weights_only=True)  # nothing but tensors and plain Python
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert set(content["state_dict"]) == trained
    assert all("lora_" in name for name in trained)
    faults = [
        (LoRA(rank=3), r"holds an adapter of rank 2, but model\.init_args\.finetune\.init_args\.rank=3; allowed: .*rank=2"),
        (LoRA(rank=2, alpha=4), r"adapter of alpha 32, but model\.init_args\.finetune\.init_args\.alpha=4; allowed: .*alpha=32"),
        (LoRA(rank=2, target_modules="all-linear"), r"missing \(policy.*model\.init_args\.finetune"),
        (Full(), r"missing \(policy.*model\.init_args\.finetune"),
    ]
    for finetune, fault in faults:
        other = module_of(build, finetune=finetune)
        with pytest.raises(ValueError, match=fault):
            fit(other, trainer, Save(saved.folder), resume=saved.folder / "8.ckpt")


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_an_evaluation_with_another_alpha_is_refused_too(build, trainer, straight, stage):
    other = module_of(build, finetune=LoRA(rank=2, alpha=4))
    with pytest.raises(ValueError, match=r"model\.init_args\.finetune\.init_args\.alpha=4; allowed: .*alpha=32"):
        getattr(trainer(), stage)(other, SceneData(val_size=2, test_size=2), ckpt_path=straight[1].folder / "8.ckpt")


def test_settings_of_a_resumed_run_are_the_configurations(build, trainer, straight):
    """Another learning rate and another schedule: the weights move as far as these say."""
    module, saved = straight
    still = module_of(build, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.0), scheduler=None)
    run = trainer(max_steps=12)
    run.fit(still, SceneData(batch_size=4, train_size=8), ckpt_path=saved.folder / "8.ckpt")
    content = torch.load(saved.folder / "8.ckpt", weights_only=True)
    for name, weight in content["state_dict"].items():
        assert torch.equal(weight, still.get_parameter(name).cpu())
    assert [state["step"] for state in run.optimizers[0].state.values()][0] == 12  # moments went on


def test_a_checkpoint_of_weights_only_is_one_line(build, trainer, straight, tmp_path):
    module = module_of(build)
    run = trainer(max_steps=4)
    run.fit(module, SceneData(batch_size=4, train_size=8))
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=r"weights\.ckpt' holds weights only .* so no run can continue from it"):
        fit(module_of(build), trainer, Save(tmp_path), resume=tmp_path / "weights.ckpt")
