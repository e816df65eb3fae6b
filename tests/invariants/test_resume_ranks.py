"""Runs of several processes: resumed bit for bit, and with another number of processes on the same images."""

import multiprocessing
from functools import partial

import lightning as L
import pytest
import torch

from tests.strategy.test_strategy import Recorder, module
from tests.two_processes import run_on, run_on_two
from uae.checkpoints.files import CheckpointFiles
from uae.miniature.data import SceneData
from uae.strategy import FSDP2Strategy

STEPS = 12  # three rollouts of four steps; an epoch has two


class Seen(Recorder):
    """Also which images and captions every rollout had, of all ranks together."""

    def __init__(self, folder=None):
        super().__init__()
        self.folder, self.images, self.texts = folder, [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        if not module.at_rollout_boundary:
            return
        texts, per_image = module.experience.rollout.texts, module.plan.group
        mine = {i: texts[n * per_image : (n + 1) * per_image] for n, i in enumerate(batch["id"].tolist())}
        everyone = [mine]
        if trainer.world_size > 1:
            everyone = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, mine)
        self.texts.append({image: text for part in everyone for image, text in part.items()})
        if self.folder:
            trainer.save_checkpoint(f"{self.folder}/{trainer.global_step}.ckpt")

    def on_train_end(self, trainer, module):
        super().on_train_end(trainer, module)
        self.result["texts"] = self.texts


def warmup(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 10)


def run(strategy, folder, finetune, devices, keep=False, resume=None, **changes):
    seen, model = Seen(folder if keep else None), module(finetune)
    model.num_iterations = 4  # and one mini-batch: several would be of other images with other numbers of processes
    settings = {"optimizer": partial(torch.optim.AdamW, lr=0.01), "scheduler": warmup, **changes}
    model.optimizer, model.scheduler = settings["optimizer"], settings["scheduler"]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
    fit = L.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, default_root_dir=folder, max_steps=STEPS,
        enable_checkpointing=False, inference_mode=False, callbacks=[seen], plugins=[CheckpointFiles()], **quiet,
    )  # fmt: skip
    data = SceneData(batch_size=4 // devices, train_size=8)
    fit.fit(model, data, ckpt_path=resume)
    return seen.result


def two(rank, folder, strategy):
    results = {}
    for finetune in ("lora", "full"):
        here = f"{folder}/{strategy}/{finetune}"
        straight = run(strategy, here, finetune, 2, keep=True)
        results[finetune] = straight, {at: run(strategy, here, finetune, 2, resume=f"{here}/{at}.ckpt") for at in (4, 8)}
    return results


def widened(rank, folder):
    """Two processes go on where one was."""
    return run("ddp", folder, "lora", 2, resume=f"{folder}/8.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_resume_bit_for_bit_and_one_continues_them(tmp_path, strategy):
    first, second = run_on_two(two, str(tmp_path), strategy, timeout=300)
    for finetune, (straight, resumed) in first.items():
        assert_equal(second[finetune][0], straight)
        assert len(straight["losses"]) == STEPS
        assert max(map(abs, straight["losses"])) > 1e-3
        for at, again in resumed.items():
            assert_equal(again, straight, at)
        here = tmp_path / strategy / finetune
        one = alone(strategy, str(here), finetune, 1, False, str(here / "8.ckpt"))
        assert_same_course(one, straight, at=8)


def assert_equal(again, straight, at=0):
    """To the last bit."""
    assert again["losses"] == straight["losses"][at:]
    assert again["norms"] == straight["norms"][at:]
    assert again["texts"] == straight["texts"][at // 4 :]
    torch.testing.assert_close(again["weights"], straight["weights"], rtol=0, atol=0)


def alone(*args):
    """In a process of its own: a strategy for many leaves its process group behind."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply_async(run, args).get(timeout=200)


def assert_same_course(other, straight, at):
    """The same images and captions; numbers but for rounding, which sums over other batches make."""
    assert other["texts"] == straight["texts"][at // 4 :]
    torch.testing.assert_close(other["losses"], straight["losses"][at:], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other["norms"], straight["norms"][at:], rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_two_processes_continue_one(tmp_path):
    straight = run("auto", str(tmp_path), "lora", 1, keep=True)
    first, second = run_on_two(widened, str(tmp_path), timeout=200)
    assert_equal(first, second)
    assert_same_course(first, straight, at=8)


def resettled(rank, folder, shards):
    """Runs that go on with other settings than those of the run that wrote the checkpoint."""

    def again(resume=f"{folder}/8.ckpt", **changes):
        strategy = FSDP2Strategy(save_distributed_checkpoint=shards)
        return run(strategy, folder, "lora", 1, keep=resume is None, resume=resume, **changes)

    straight = again(resume=None, scheduler=None)
    still = again(optimizer=partial(torch.optim.AdamW, lr=0.0, weight_decay=0.5), scheduler=warmup)
    same = again(scheduler=None)
    faults = []
    for other in (partial(torch.optim.SGD, lr=0.1), partial(torch.optim.AdamW, amsgrad=True)):
        try:
            again(optimizer=other)
        except ValueError as error:
            faults.append(str(error))
    return straight, still, same, faults


@pytest.mark.slow
@pytest.mark.parametrize("shards", [True, False], ids=["shards", "file"])
def test_a_sharded_run_resumes_with_the_configurations_settings(tmp_path, shards):
    ((straight, still, same, faults),) = run_on(1, resettled, str(tmp_path), shards, timeout=200)
    assert same["losses"] == straight["losses"][8:]
    assert still["losses"] != same["losses"]
    assert len({*still["losses"]}) == 1  # one rollout, whose policy no step of 0 moves
    assert len(faults) == 2
    for fault, name in zip(faults, ("SGD (its state of a weight: nothing)", "AdamW (its state of a weight: exp_avg"), strict=True):
        assert fault.startswith(f"model.init_args.optimizer is {name}")
