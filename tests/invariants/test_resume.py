import pytest
import torch
from lightning.pytorch import Callback

from uae.data.module import SceneData
from uae.grpo import GRPOLoss
from uae.models.finetune import LoRA

WARMUP = {"scheduler": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 10)}


class Save(Callback):
    """Saves after one optimizer step, and notes which steps were rollout boundaries."""

    def __init__(self, path, at):
        self.path, self.at, self.boundaries = path, at, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if module.at_rollout_boundary:
            self.boundaries.append(trainer.global_step)
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)


def module_of(build):
    adam = lambda parameters: torch.optim.AdamW(parameters, lr=0.01)  # noqa: E731
    return build(
        mini_batches=2, num_iterations=2, loss=GRPOLoss(beta=0.1), finetune=LoRA(rank=2), optimizer=adam, **WARMUP
    )


def fit(build, trainer, path, at, resume=None):
    module, save = module_of(build), Save(path, at)
    data = SceneData(batch_size=4, train_size=16)  # four rollouts of four steps per epoch
    torch.manual_seed(len(str(resume)))  # global state must not matter
    trainer(max_steps=24, callbacks=[save]).fit(module, data, ckpt_path=resume)
    return {name: p.detach().clone() for name, p in module.named_parameters()}, save.boundaries, module


@pytest.mark.parametrize("at", [8, 16])  # inside an epoch, and between two
def test_resumed_at_a_rollout_boundary_is_uninterrupted(build, trainer, tmp_path, at):
    straight, boundaries, module = fit(build, trainer, tmp_path / "saved.ckpt", at)
    assert boundaries == [4, 8, 12, 16, 20, 24]
    resumed, boundaries, again = fit(build, trainer, tmp_path / "other.ckpt", -1, resume=tmp_path / "saved.ckpt")
    assert boundaries == [step for step in (12, 16, 20, 24) if step > at]
    assert again.experience.rollout.texts == module.experience.rollout.texts
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    begun = module_of(build)
    begun.configure_model()
    assert any(not torch.equal(straight[name], p) for name, p in begun.named_parameters())


def test_resume_inside_a_rollout_is_refused(build, trainer, tmp_path):
    fit(build, trainer, tmp_path / "inside.ckpt", 6)
    with pytest.raises(RuntimeError, match="inside a rollout"):
        fit(build, trainer, tmp_path / "other.ckpt", -1, resume=tmp_path / "inside.ckpt")


def test_a_checkpoint_of_something_else_is_refused(build, trainer, tmp_path):
    fit(build, trainer, tmp_path / "saved.ckpt", 8)
    content = torch.load(tmp_path / "saved.ckpt", weights_only=True)  # nothing but tensors and plain Python
    module = module_of(build)
    module.configure_model()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert set(content["state_dict"]) == trained
    assert all("lora_" in name for name in trained)
    for finetune, fault in ((LoRA(rank=3), "of another shape"), (None, "missing")):
        other = build(**({"finetune": finetune} if finetune else {}))
        with pytest.raises(ValueError, match=rf"{fault} \(policy.*model\.finetune"):
            trainer(max_steps=9).fit(other, SceneData(batch_size=4, train_size=16), ckpt_path=tmp_path / "saved.ckpt")
