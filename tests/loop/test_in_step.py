"""Whatever happens to one rank, all take the same steps to the same weights: the run of one process with both batches.

Every scenario hurts rank 1 only. Its images are the second half of what one process would have had, so the same fault can
be told to one process, and what the ranks share can be compared with it.
"""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from PIL import Image
from torch.distributed.tensor import DTensor

from callbacks.health import Health
from tests.tiny_random import RandomTiny
from tests.two_processes import run_on_two
from uae.data import ImageFolderData
from uae.data.sampler import TrainBatches
from uae.encoders import LayoutEncoder
from uae.grpo import GRPOLoss
from uae.metrics import UnifiedScore
from uae.miniature.data import SceneData
from uae.models.finetune import Full, LoRA
from uae.module import UnifiedGRPO
from uae.rewards import BaseReward, WeightedReward
from uae.types import Sampling

IMAGES, GROUP, STEPS = 2, 3, 5  # of a rank's batch, of an image, of a run
VALIDATED = ("val_reward/mean", "unified_score/unified", "unified_score/n")  # what does not depend on neighbours
NAN, KEPT = math.nan, 7.0


def rank():
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


class Letters(BaseReward):
    """An exact number per caption, and faults by rollout and image of the whole batch (2 and 3 are rank 1's)."""

    def __init__(self, faults):
        self.faults, self.rollouts = faults, 0

    def __call__(self, sources_BCHW, reconstructions_NCHW, texts):
        rewards = [sum(map(ord, text)) % 17 / 16 for text in texts]
        reward_BG = torch.tensor(rewards).view(len(sources_BCHW), -1)
        if reward_BG.shape[1] == GROUP:  # not a validation
            for image, values in self.faults.get(self.rollouts, {}).items():
                if 0 <= (row := image - rank() * IMAGES) < len(reward_BG):
                    given = torch.tensor(values)
                    reward_BG[row] = torch.where(given == KEPT, reward_BG[row], given)
            self.rollouts += 1
        return reward_BG


class Record(L.Callback):
    """What the ranks should share at every step, and what they need not."""

    def __init__(self):
        self.losses, self.lengths, self.validations, self.steps = [], [], [], 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(trainer.callback_metrics["policy/loss"].item())
        self.lengths.append(module.experience.rollout.tokens_NT.shape[1])

    def on_validation_end(self, trainer, module):
        self.validations.append({name: trainer.callback_metrics[name].item() for name in VALIDATED})

    def on_train_end(self, trainer, module):
        self.steps = trainer.global_step
        weights = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in weights.items()}
        self.weights = {name: p.clone() for name, p in whole.items()}


def scenes(world, **options):
    return SceneData(**{"batch_size": 2 * IMAGES // world, "train_size": 20, "eval_batch_size": 4, "val_size": 4, **options})


def folder(world, root):
    """Photographs, of which the first of rank 1's second batch and the second of validation end in the middle."""
    return ImageFolderData(
        f"{root}/train", 24, batch_size=2 * IMAGES // world, eval_batch_size=2 // world, val_root=f"{root}/val", num_workers=0
    )


def broken_files(root):
    spoiled = list(TrainBatches(20, IMAGES, 1, 2, 0))[1][0]
    for stage, count, broken in (("train", 20, spoiled), ("val", 2, 1)):
        Path(root, stage).mkdir()
        for number in range(count):
            noise = torch.randint(0, 256, (24, 24, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
            file = Path(root, stage, f"{number:02}.png")
            Image.fromarray(noise.numpy()).save(file)
            if number == broken:
                file.write_bytes(file.read_bytes()[:300])


def bad_loss(module):
    """The second update's last mini-batch, on rank 1."""
    step = module.training_step

    def training_step(batch, batch_idx):
        loss = step(batch, batch_idx)
        last = (batch_idx + 1) % module.trainer.accumulate_grad_batches == 0
        return loss * NAN if module.global_step == 1 and last and rank() == module.trainer.world_size - 1 else loss

    module.training_step = training_step


class BadGradient(L.Callback):
    """The third update, in what rank 1 alone holds of a gradient."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == 2 and rank() == trainer.world_size - 1:
            gradient = next(p.grad for p in module.parameters() if p.grad is not None)
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).fill_(NAN)


def short_captions(module):
    """Rank 1's captions end at their first word."""
    collect = module._collect

    def brief(*arguments):
        if rank() == 1:
            module.plan = replace(module.plan, sampling=replace(module.plan.sampling, max_tokens=1))
        collect(*arguments)

    module._collect = brief


SINGLE, ALL = {2: [KEPT, NAN, KEPT], 3: [NAN, NAN, KEPT]}, {2: [NAN] * GROUP, 3: [NAN] * GROUP}
FLAT, INFINITE = {2: [0.5] * GROUP, 3: [0.5] * GROUP}, {2: [KEPT, math.inf, KEPT]}
SCENARIOS = {  # to changes of the module, of the data, and faults of rewards by rollout
    "plain": ({}, {}, {}),
    "rewards missing, without spread, infinite": (
        {"loss": GRPOLoss(aggregation="dapo")}, {"val_size": 0}, {1: SINGLE, 2: ALL, 3: FLAT, 4: INFINITE}
    ),
    "rewards missing, an uneven last batch, one validation image": (
        {"advantage_scale": "batch"}, {"val_size": 1, "train_size": 11}, {1: SINGLE, 2: ALL}
    ),
    "a loss and a gradient not finite": (
        {"mini_batches": 2, "finetune": LoRA(rank=4), "loss": GRPOLoss(beta=0.05)}, {}, {}
    ),
    "files that cannot be read": ({}, {}, {}),
    "captions that end at once": ({}, {}, {}),
}  # fmt: skip
SKIPPED = {"rewards missing, without spread, infinite": 1, "a loss and a gradient not finite": 2}


def run(strategy, scenario, root):
    """One run; what each rank saw of it."""
    world = 1 if strategy == "auto" else 2
    changes, images, faults = SCENARIOS[scenario]
    arguments = {"finetune": Full(r"^(?!.*visual\.)"), "loss": GRPOLoss(), "mini_batches": 1, **changes}
    module = UnifiedGRPO(
        system=RandomTiny(spread=0.05),
        reward=WeightedReward({"letters": Letters(faults)}, {"letters": 1.0}),
        sampling=Sampling(max_tokens=6),
        group=GROUP,
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1),
        unified_score=UnifiedScore({"layout": LayoutEncoder()}, bootstrap=0),
        **arguments,
    )
    health, record, hurts = Health(), Record(), [BadGradient()] if "gradient" in scenario else []
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, max_steps=STEPS, gradient_clip_val=0.5,
        accumulate_grad_batches=arguments["mini_batches"], inference_mode=False, use_distributed_sampler=False,
        default_root_dir=root, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[*hurts, health, record], num_sanity_val_steps=0,
        check_val_every_n_epoch=None, val_check_interval=2,
    )  # fmt: skip
    data = folder(world, root) if "files" in scenario else scenes(world, **images)
    if "gradient" in scenario:
        bad_loss(module)
    if "captions" in scenario:
        short_captions(module)
    trainer.fit(module, data)
    shared = {
        "losses": record.losses, "validations": record.validations, "weights": record.weights,
        "steps": record.steps, "skipped": health.skipped,
    }  # fmt: skip
    return {"shared": shared, "lengths": record.lengths, "unreadable": len(data.skipped)}


def run_all(rank, strategy, root):
    return {scenario: run(strategy, scenario, root) for scenario in SCENARIOS}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("images"))
    broken_files(root)
    both = {strategy: run_on_two(run_all, strategy, root, timeout=400) for strategy in ("ddp", "fsdp2")}
    return {"auto": [run_all(0, "auto", root)], **both}


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_stay_in_step(runs, strategy, scenario):
    first, second = (ranks[scenario] for ranks in runs[strategy])
    one = runs["auto"][0][scenario]
    torch.testing.assert_close(first["shared"], second["shared"], rtol=0, atol=0, equal_nan=True)
    assert first["shared"]["steps"] == STEPS
    assert first["shared"]["skipped"] == SKIPPED.get(scenario, 0)
    assert all(weight.isfinite().all() for weight in first["shared"]["weights"].values())
    if "captions" in scenario:  # one process cannot be told this
        assert max(second["lengths"]) == 1 < min(first["lengths"])
        return
    for what in ("weights", "validations", "skipped"):  # not losses: mini-batches of two ranks hold other images
        torch.testing.assert_close(first["shared"][what], one["shared"][what], rtol=1e-5, atol=1e-6)
    if "files" in scenario:
        assert first["unreadable"] == 0 < second["unreadable"] == one["unreadable"] == 2


@pytest.mark.slow
def test_the_scenarios_happened(runs):
    """What is the same everywhere has to differ from the run that nothing happened to."""
    shared = {scenario: one["shared"] for scenario, one in runs["auto"][0].items()}
    validated = [scores["unified_score/n"] for one in shared.values() for scores in one["validations"][:1]]
    assert validated == [4, 1, 4, 1, 4]  # all but the one without validation; an unreadable file does not count
    plain = shared.pop("plain")["weights"]
    for scenario, one in shared.items():
        changed = one["weights"].keys() != plain.keys() or any(
            not torch.allclose(weight, plain[name], rtol=0, atol=1e-4) for name, weight in one["weights"].items()
        )
        assert changed or "captions" in scenario, scenario
