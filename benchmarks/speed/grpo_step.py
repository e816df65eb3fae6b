"""Seconds and memory of a GRPO step on captions, beside TRL on the same tiny Qwen2.5-VL.

    pip install trl
    python benchmarks/speed/grpo_step.py

One image, a group of G captions of exactly T tokens, LoRA of rank 16 on the language model, a KL term against the start, one
thread. Both sides run in processes of their own, in turns, through the loop that their users have: Lightning's and TRL's. The
reward costs nothing, and nothing is drawn. A step is all that happens from one optimizer step to the next.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from uae.grpo import GRPOLoss
from uae.miniature import tiny
from uae.miniature.tiny import END, IMAGE, PAD, UNKNOWN, VIDEO, VISION_END, VISION_START
from uae.models.captioners.captioner import HFCaptioner
from uae.models.finetune import LoRA
from uae.module import UnifiedGRPO
from uae.rewards import BaseReward, WeightedReward
from uae.types import UMM, Sampling

CASES = ("64/32/8", "256/32/4", "256/32/8", "256/32/16", "256/128/8", "1024/64/8")  # vision tokens / caption tokens / group
WORDS = [*tiny.VOCABULARY, *(f"w{number}" for number in range(8192 - len(tiny.VOCABULARY)))]
QUESTION = "describe the picture"
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
MIB = 2**20


def model() -> Any:
    """A Qwen2.5-VL with random weights: hidden size 256, four layers, a vocabulary of 8192, an image tower of width 128."""
    torch.manual_seed(0)
    tower = {"hidden_size": 128, "intermediate_size": 384, "depth": 4, "fullatt_block_indexes": [1, 3]}
    return tiny.create_captioner(256, 4, WORDS, tower)


def side_of(vision_tokens: int) -> int:
    """Pixels of a side of images that have so many tokens."""
    return int(8 * vision_tokens**0.5)


def specials() -> list[int]:
    """Ids that no caption may have, so that all are of the same length."""
    return [WORDS.index(word) for word in (END, PAD, UNKNOWN, IMAGE, VIDEO, VISION_START, VISION_END)]


def worth(texts: list[str]) -> list[float]:
    """A reward that differs between captions."""
    return [sum(map(ord, text)) % 997 / 997 for text in texts]


class Steps:
    """Wall and CPU seconds from the end of one optimizer step to the end of the next, and the peak of memory."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []
        self.before = peak()

    def mark(self) -> None:
        """The end of a step."""
        self.marks.append((time.perf_counter(), time.process_time()))

    def report(self) -> dict[str, Any]:
        """Steps after the first."""
        wall, cpu = ([b - a for a, b in zip(x, x[1:], strict=False)] for x in zip(*self.marks, strict=True))
        return {"wall": wall, "cpu": cpu, "peak_mib": peak() - self.before}


def peak() -> float:
    """The largest resident memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Texts(list[str]):
    """A condition that is the captions themselves."""

    def index(self, rows: Sequence[int]) -> Texts:
        """Some of them."""
        return Texts(self[row] for row in rows)


class Reader:
    """A conditioner that does nothing."""

    truncated = 0

    def to(self, device: torch.device) -> Reader:
        """Nothing to move."""
        return self

    def encode(self, texts: list[str], rollout: Any = None) -> Texts:
        """The captions."""
        return Texts(texts)


class Painter:
    """A renderer that draws black."""

    def to(self, device: torch.device) -> Painter:
        """Nothing to move."""
        return self

    def modules(self) -> list[torch.nn.Module]:
        """No networks."""
        return []

    def render(self, condition: Texts, seeds: Sequence[int], grad: bool = False) -> Tensor:
        """Small black images."""
        return torch.zeros(len(condition), 3, 8, 8)


class Worth(BaseReward):
    """The reward of both sides."""

    def __call__(self, sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> Tensor:
        """By caption."""
        return torch.tensor(worth(texts)).view(len(sources_BCHW), -1)


@dataclass
class System:
    """The captioner, and nothing that costs time behind it."""

    vision_tokens: int

    def build(self) -> UMM:
        """Assemble it."""
        captioner = HFCaptioner(model(), tiny.processor(side_of(self.vision_tokens), WORDS), QUESTION, extra_banned_ids=specials())
        return UMM(captioner, Reader(), Painter())


class Clock(pl.Callback):
    """Marks the steps of Lightning."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def on_train_batch_end(self, *args: Any) -> None:
        """The end of a step."""
        self.steps.mark()


def ours(vision_tokens: int, tokens: int, group: int, steps: int) -> dict[str, Any]:
    """`uae.module.UnifiedGRPO` under Lightning's trainer."""
    side, generator, clock = side_of(vision_tokens), torch.Generator().manual_seed(0), Steps()
    batches = [{"image": torch.rand(1, 3, side, side, generator=generator), "id": torch.tensor([n])} for n in range(steps)]
    module = UnifiedGRPO(
        System(vision_tokens), WeightedReward({"worth": Worth()}, {"worth": 1.0}), LoRA(rank=16, target_modules=TARGETS),
        loss=GRPOLoss(beta=0.04), sampling=Sampling(max_tokens=tokens), group=group,
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, callbacks=[Clock(clock)], gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return clock.report()


def trl(vision_tokens: int, tokens: int, group: int, steps: int) -> dict[str, Any]:
    """TRL's ``GRPOTrainer``."""
    import numpy as np
    from datasets import Dataset
    from peft import LoraConfig
    from PIL import Image
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    side = side_of(vision_tokens)
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 255, (side, side, 3), dtype=np.uint8)) for _ in range(steps)]
    prompt = [{"role": "user", "content": QUESTION}]
    rows = Dataset.from_dict({"prompt": [prompt] * steps, "image": images})
    clock = Steps()

    class Marks(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.mark()

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=group, num_generations=group, max_completion_length=tokens, beta=0.04,
            max_steps=steps, report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no",
            logging_strategy="no", disable_tqdm=True, loss_type="grpo", learning_rate=1e-3, max_grad_norm=1.0,
            generation_kwargs={"min_new_tokens": tokens, "suppress_tokens": specials()}, dataloader_num_workers=0,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model(), args=config, train_dataset=rows, processing_class=tiny.processor(side_of(vision_tokens), WORDS),
            reward_funcs=lambda completions, **_: worth([one[0]["content"] for one in completions]),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS), callbacks=[Marks()],
        )  # fmt: skip
        trainer.train()
    return clock.report()


def alone(side: str, case: str, steps: int) -> dict[str, Any]:
    """One side of one case, in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--cases", case, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{side}, {case}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def race(case: str, steps: int, rounds: int) -> dict[str, Any]:
    """Both sides in turns."""
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for number in range(rounds):
        for side in sorted(found, reverse=bool(number % 2)):
            found[side].append(alone(side, case, steps))
    seconds = {side: statistics.median(x for one in runs for x in one["cpu"]) for side, runs in found.items()}
    memory = {side: statistics.median(one["peak_mib"] for one in runs) for side, runs in found.items()}
    ratio = seconds["trl"] / seconds["ours"]
    print(f"{case}: {seconds['trl']:.2f} s of TRL, {seconds['ours']:.2f} s of ours, {ratio:.1f} x", flush=True)
    return {"case": case, "seconds": seconds, "peak_mib": memory, "runs": found}


def markdown(races: list[dict[str, Any]]) -> str:
    """The table."""
    heads = ["vision tokens / caption tokens / group", "TRL, CPU s", "ours, CPU s", "ratio", "TRL, MiB", "ours, MiB", "ratio"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for one in races:
        seconds, memory = one["seconds"], one["peak_mib"]
        lines.append(
            f"| {one['case']} | {seconds['trl']:.2f} | {seconds['ours']:.2f} | {seconds['trl'] / seconds['ours']:.1f} | "
            f"{memory['trl']:.0f} | {memory['ours']:.0f} | {memory['trl'] / memory['ours']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="vision tokens / caption tokens / group")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a process; the first is not counted")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=["ours", "trl"], help="run this one only, and print its numbers")
    arguments = parser.parse_args()
    if arguments.side:
        numbers = [int(part) for part in arguments.cases[0].split("/")]
        torch.set_num_threads(1)
        print(json.dumps({"ours": ours, "trl": trl}[arguments.side](*numbers, steps=arguments.steps)))
    else:
        table = markdown([race(case, arguments.steps, arguments.rounds) for case in arguments.cases])
        print(table)
