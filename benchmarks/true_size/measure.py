"""Seconds and peak memory of every stage of a run."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import psutil
import torch
import yaml
from torch.utils.data import DataLoader

from benchmarks.true_size.systems import CASES, CLIP, RandomEncoder, Work
from uae import rollout
from uae.grpo import GRPOLoss
from uae.memory import plan
from uae.memory.floors import DEVICES, Device, by_stage
from uae.memory.table import PHASES
from uae.models.finetune import LoRA
from uae.module import UnifiedGRPO
from uae.rewards import EncoderSimilarity, WeightedReward
from uae.stopwatch import Stopwatch
from uae.types import Sampling

LORA = Path(__file__).parents[2] / "configs/finetune/lora_pretrained.yaml"
EVERY = 0.005  # seconds between two looks at the memory of the process


class Noise(pl.LightningDataModule):
    """Random images.

    Args:
        batch_size: Images of a rollout.
        image_size: Height and width in pixels.
        rollouts: Number of batches.
    """

    eval_batch_size = 1

    def __init__(self, batch_size: int, image_size: int, rollouts: int) -> None:
        super().__init__()
        self.batch_size, self.image_size, self.rollouts = batch_size, image_size, rollouts

    def train_dataloader(self) -> Any:
        """One batch per rollout."""
        noise, side = torch.Generator().manual_seed(0), self.image_size
        images = [torch.rand(self.batch_size, 3, side, side, generator=noise) for _ in range(self.rollouts)]
        ids = torch.arange(self.batch_size)
        batches: Any = [{"image": image, "id": ids + n * self.batch_size} for n, image in enumerate(images)]
        return DataLoader(batches, batch_size=None)


class Gauge(pl.Callback):
    """The largest memory of every stage, beyond what was in use at the start: of the allocator on a GPU, else of the process.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self.gpu, self.stage, self.peaks = device == "cuda", "build", dict[str, int]()
        self.process = psutil.Process()
        self.before, self.open = self._used(), True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        if not self.gpu:
            self.thread.start()

    def _used(self) -> int:
        return torch.cuda.max_memory_allocated() if self.gpu else self.process.memory_info().rss

    def _watch(self) -> None:
        while self.open:
            self.note()
            time.sleep(EVERY)

    def note(self) -> None:
        """Compare the memory in use with the largest one of this stage."""
        stage = self.stage
        self.peaks[stage] = max(self.peaks.get(stage, 0), self._used() - self.before)

    def enter(self, stage: str) -> None:
        """Another stage begins."""
        self.note()
        self.stage = stage
        if self.gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """All that is not inside a stage of a rollout belongs to the update."""
        self.enter("update")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The last look."""
        self.note()
        self.open = False

    @contextmanager
    def stages(self) -> Iterator[None]:
        """Inside, every stage that a rollout times is a stage here."""
        gauge = self

        class Watched(Stopwatch):
            @contextmanager
            def __call__(self, stage: str) -> Iterator[None]:
                with super().__call__(stage):
                    gauge.enter(stage)
                    yield
                gauge.enter("update")

        with mock.patch.object(rollout, "Stopwatch", Watched):
            yield


def module_of(case: str, work: Work, group: int, tokens: int) -> UnifiedGRPO:
    """The run of a user, with one mini-batch."""
    settings = yaml.safe_load(LORA.read_text())["model"]["init_args"]["finetune"]["init_args"]
    return UnifiedGRPO(
        CASES[case](work),
        WeightedReward({"clip": EncoderSimilarity(RandomEncoder(CLIP))}, {"clip": 1.0}),
        LoRA(**settings),
        loss=GRPOLoss(beta=0.01),
        sampling=Sampling(max_tokens=tokens),
        group=group,
        ratio_tolerance=math.inf,  # measured here
    )


def measured(case: str, device: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Run a case in this process.

    Args:
        case: A name of `CASES`.
        device: "cpu" or "cuda".
        sizes: ``batch``, ``group``, ``tokens``, ``steps``, ``size`` and ``rollouts``.

    Returns:
        Seconds, floors, peaks and plan by stage; rates; what failed, if memory was short.
    """
    module = module_of(case, Work(device, sizes["size"], sizes["steps"]), sizes["group"], sizes["tokens"])
    data = Noise(sizes["batch"], sizes["size"], sizes["rollouts"])
    accelerator = "gpu" if device == "cuda" else "cpu"
    planned = plan(module, data, {"accelerator": accelerator, "devices": 1}, with_floors=True)
    by_plan = {phase: planned.total(phase, sharded=False) for phase in PHASES}
    rates, gauge = rates_of(device), Gauge(device)
    trainer = pl.Trainer(
        accelerator=accelerator, devices=1, max_steps=sizes["rollouts"], callbacks=[gauge], gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        num_sanity_val_steps=0, log_every_n_steps=1,
    )  # fmt: skip
    try:
        with gauge.stages():
            trainer.fit(module, data)
    except torch.OutOfMemoryError:
        return {"case": case, "failed": f"out of memory in stage {gauge.stage}", "plan": by_plan, "peaks": gauge.peaks}
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    seconds = {name.removeprefix("time/"): value for name, value in logged.items() if name.startswith("time/")}
    return {
        "case": case,
        "seconds": seconds,
        "floors": by_stage(planned.floors, rates),
        "peaks": gauge.peaks,
        "plan": by_plan,
        "before": gauge.before,
        "tokens_per_second": logged["speed/tokens_per_second"],
        "images_per_second": logged["speed/images_per_second"],
        "sampler_gap": logged["policy/sampler_gap"],
        "peak_rates": vars(rates),
    }


def rates_of(device: str) -> Device:
    """The published peaks of the GPU, or what a product of matrices and a copy reach on this device."""
    if device == "cuda" and torch.cuda.get_device_name() in DEVICES:
        return DEVICES[torch.cuda.get_device_name()]
    side = 8192 if device == "cuda" else 1024
    square = torch.ones(side, side, dtype=torch.bfloat16, device=device)
    source = torch.ones(2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    products = _per_second(lambda: square @ square)
    copies = _per_second(lambda: target.copy_(source))
    return Device("this device as measured", products * 2 * side**3, copies * 2 * source.nbytes)


def _per_second(work: Any, least: float = 2.0) -> float:
    """How often something can be done in a second, by its fastest time within two seconds: other programs only slow it down."""
    work()
    started, fastest = _now(), float("inf")
    while (before := _now()) - started < least:
        work()
        fastest = min(fastest, _now() - before)
    return 1 / fastest


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
