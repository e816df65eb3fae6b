import json
import os
import signal

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from callbacks.preemption import Preemption
from uae.coldstart import ColdStart, Objective
from uae.weights.checksums import verify


class Line(Objective):
    """Fits one number to 3."""

    def build(self):
        self.number = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.number.weight)
        self.seen = []

    def forward(self, batch, progress):
        self.seen.append(progress)
        return {"loss": (self.number.weight - 3).square().sum(), "other": torch.tensor(1.0)}

    def score(self, batch):
        return {"number": self.number.weight.item()}

    def save(self, folder):
        from safetensors.torch import save_file

        assert not self.training
        (folder / "line").mkdir(parents=True)
        save_file(self.number.state_dict(), folder / "line" / "number.safetensors")


def fit(model, **changes):
    batches = [{"image": torch.zeros(2, 3, 24, 24), "id": torch.arange(2)}] * 100
    arguments = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(**{**arguments, "enable_model_summary": False, "max_steps": 20, "max_epochs": -1, **changes})
    with pytest.warns(match="num_workers|val_dataloader|loop|validation_step"):
        trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))
    return trainer


def test_a_fit_lowers_the_loss_and_leaves_verified_weights(tmp_path):
    model = ColdStart(Line(), learning_rate=0.5, warmup=4, weight_decay=0.0, folder=str(tmp_path / "weights"))
    trainer = fit(model)
    assert abs(model.objective.number.weight.item() - 3) < 1
    assert model.objective.seen == [step / 20 for step in range(20)]
    verify(tmp_path / "weights")
    assert list(json.loads((tmp_path / "weights/checksums.json").read_text())) == ["line/number.safetensors"]
    assert set(trainer.callback_metrics) == {"test_module/loss", "test_module/other"}


def test_a_dry_run_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"model\.init_args\.folder='' is no folder"):
        ColdStart(Line(), folder="")
    fit(ColdStart(Line(), folder=str(tmp_path / "weights")), fast_dev_run=2)
    assert not (tmp_path / "weights").exists()


def test_a_run_that_is_asked_to_end_writes_no_weights(tmp_path):
    class Scheduler(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    model = ColdStart(Line(), folder=str(tmp_path / "weights"))
    trainer = fit(model, callbacks=[Scheduler(), Preemption()], default_root_dir=tmp_path)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert trainer.global_step == 4
    assert (tmp_path / "checkpoints/preempted.ckpt").exists()
    assert not (tmp_path / "weights").exists()  # half of a training would pass for all of it


def test_the_rate_rises_and_falls():
    model = ColdStart(Line(), learning_rate=2.0, warmup=10)
    model.configure_model()
    model.configure_model()  # idempotent
    model.trainer = type("T", (), {"max_steps": 100})()
    optimizers = model.configure_optimizers()
    schedule, optimizer = optimizers["lr_scheduler"]["scheduler"], optimizers["optimizer"]
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(2.0, rel=0.03)
    assert 8 <= rates.index(max(rates)) <= 10
    assert rates[50] == pytest.approx(1.0)  # half of the cosine
    assert rates[100] == pytest.approx(0.0, abs=1e-6)


def test_a_schedule_needs_an_end(tmp_path):
    with pytest.raises(ValueError, match="trainer.max_steps=-1"):
        fit(ColdStart(Line(), folder=str(tmp_path)), max_steps=-1, max_epochs=1)


class Slope(Line):
    """A loss whose gradient is always the mean of what the batches say."""

    def forward(self, batch, progress):
        return {"loss": (self.number.weight * batch["image"].mean()).sum()}


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize(("accumulate", "gradients"), [(2, [3.0, 7.0]), (4, [13 / 3] * 2)])
def test_every_batch_of_a_step_counts_the_same_also_at_the_end_of_an_epoch(tmp_path, accumulate, gradients):
    """Batches of 2, 4 and 7 are an epoch: the window that its end cuts short is a mean as well."""
    seen = []

    class Gradient(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen.append(module.objective.number.weight.grad.item())

    batches = [{"image": torch.full((2, 3, 4, 4), value), "id": torch.arange(2)} for value in (2.0, 4.0, 7.0)]
    run = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        max_steps=2, limit_val_batches=0, accumulate_grad_batches=accumulate, callbacks=[Gradient()],
    )  # fmt: skip
    run.fit(ColdStart(Slope(), folder=str(tmp_path)), torch.utils.data.DataLoader(batches, batch_size=None))
    assert seen == pytest.approx(gradients)
