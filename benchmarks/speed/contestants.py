"""A GRPO step on captions in three ways, on the same tiny Qwen2.5-VL: ours, TRL's, and plain rows.

B images, a group of G captions of exactly T tokens each, LoRA of rank 16 on the language model, a KL term against the start. The
reward costs nothing, and nothing is drawn. A step is all that happens from one optimizer step to the next. Ours and TRL's run
through the loop that their users have, Lightning's and transformers'. Plain rows are the least code: every caption is a row with
its own copy of image and prompt, in ``generate`` of transformers, in the reference's pass and in the update.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from racing import forget_peak, peak
from torch import Tensor

from uae.grpo import GRPOLoss
from uae.miniature import tiny
from uae.miniature.tiny import END, IMAGE, PAD, UNKNOWN, VIDEO, VISION_END, VISION_START
from uae.models.captioners.captioner import HFCaptioner
from uae.models.finetune import LoRA
from uae.module import UnifiedGRPO
from uae.rewards import BaseReward, WeightedReward
from uae.types import UMM, Sampling

WORDS = [*tiny.VOCABULARY, *(f"w{number}" for number in range(8192 - len(tiny.VOCABULARY)))]
SPECIALS = [WORDS.index(word) for word in (END, PAD, UNKNOWN, IMAGE, VIDEO, VISION_START, VISION_END)]  # so no caption ends early
QUESTION = "describe the picture"
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
BETA = 0.04


@dataclass(frozen=True)
class Case:
    """Sizes of a step.

    Args:
        vision: Tokens of an image in the prompt, a square of an even number.
        tokens: Tokens of a caption.
        group: Captions of an image.
        images: Images of a step.
    """

    vision: int
    tokens: int
    group: int
    images: int = 1

    @property
    def side(self) -> int:
        """Pixels of a side of an image."""
        return int(8 * self.vision**0.5)

    def pictures(self, steps: int) -> list[Tensor]:
        """Random images ``[B, 3, H, W]`` of every step."""
        generator = torch.Generator().manual_seed(0)
        return [torch.rand(self.images, 3, self.side, self.side, generator=generator) for _ in range(steps)]


def model() -> Any:
    """A Qwen2.5-VL with random weights: hidden size 256, four layers, a vocabulary of 8192, an image tower of width 128."""
    torch.manual_seed(0)
    tower = {"hidden_size": 128, "intermediate_size": 384, "depth": 4, "fullatt_block_indexes": [1, 3]}
    return tiny.create_captioner(256, 4, WORDS, tower)


def worth(texts: list[str]) -> list[float]:
    """A reward that differs between captions."""
    return [sum(map(ord, text)) % 997 / 997 for text in texts]


class Steps:
    """Wall and CPU seconds from the end of one optimizer step to the end of the next, and the peak of memory."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []
        self.before = forget_peak()

    def mark(self) -> None:
        """The end of a step."""
        self.marks.append((time.perf_counter(), time.process_time()))

    def report(self) -> dict[str, Any]:
        """Steps after the first."""
        wall, cpu = ([b - a for a, b in zip(x, x[1:], strict=False)] for x in zip(*self.marks, strict=True))
        return {"wall": wall, "cpu": cpu, "peak_mib": peak() - self.before}


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

    side: int

    def build(self) -> UMM:
        """Assemble it."""
        captioner = HFCaptioner(model(), tiny.processor(self.side, WORDS), QUESTION, extra_banned_ids=SPECIALS)
        return UMM(captioner, Reader(), Painter())


class Clock(pl.Callback):
    """Marks the steps of Lightning."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def on_train_batch_end(self, *args: Any) -> None:
        """The end of a step."""
        self.steps.mark()


def ours(case: Case, steps: int) -> dict[str, Any]:
    """`uae.module.UnifiedGRPO` under Lightning's trainer."""
    clock = Steps()
    batches = [{"image": images, "id": torch.arange(len(images)) + 100 * n} for n, images in enumerate(case.pictures(steps))]
    module = UnifiedGRPO(
        System(case.side), WeightedReward({"worth": Worth()}, {"worth": 1.0}), LoRA(rank=16, target_modules=TARGETS),
        loss=GRPOLoss(beta=BETA), sampling=Sampling(max_tokens=case.tokens), group=case.group,
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, callbacks=[Clock(clock)], gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return clock.report()


def trl(case: Case, steps: int) -> dict[str, Any]:
    """TRL's ``GRPOTrainer``."""
    from datasets import Dataset
    from peft import LoraConfig
    from torchvision.transforms.functional import to_pil_image
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    images = [to_pil_image(image) for batch in case.pictures(steps) for image in batch]
    prompt = [{"role": "user", "content": QUESTION}]
    rows = Dataset.from_dict({"prompt": [prompt] * len(images), "image": images})
    clock = Steps()

    class Marks(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.mark()

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=case.group * case.images, num_generations=case.group,
            max_completion_length=case.tokens, beta=BETA, max_steps=steps, report_to="none", use_cpu=True, bf16=False,
            gradient_checkpointing=False, save_strategy="no", logging_strategy="no", disable_tqdm=True, loss_type="grpo",
            learning_rate=1e-3, max_grad_norm=1.0, dataloader_num_workers=0,
            generation_kwargs={"min_new_tokens": case.tokens, "suppress_tokens": SPECIALS},
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model(), args=config, train_dataset=rows, processing_class=tiny.processor(case.side, WORDS),
            reward_funcs=lambda completions, **_: worth([one[0]["content"] for one in completions]),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS), callbacks=[Marks()],
        )  # fmt: skip
        trainer.train()
    return clock.report()


def plain(case: Case, steps: int) -> dict[str, Any]:
    """Plain rows, without any trainer."""
    from peft import LoraConfig, get_peft_model

    network: Any = get_peft_model(model(), LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
    processor = tiny.processor(case.side, WORDS)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    clock = Steps()
    for images in case.pictures(steps):
        inputs = rows_of(processor, images, case.group)
        with torch.no_grad():
            ids = generate(network, inputs, case.tokens)
            texts = processor.batch_decode(ids[:, -case.tokens :])
            with network.disable_adapter():
                reference = logprobs(network, inputs, ids, case.tokens)
        reward = torch.tensor(worth(texts)).view(-1, case.group)
        advantage = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-6)).view(-1, 1)
        logp = logprobs(network, inputs, ids, case.tokens)
        gap = reference - logp
        loss = -(advantage * (logp - logp.detach()).exp()) + BETA * (gap.exp() - gap - 1)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.mark()
    return clock.report()


def rows_of(processor: Any, images: Tensor, copies: int) -> dict[str, Tensor]:
    """The processor's output for some copies of every image."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    repeated = [(image * 255).round().to(torch.uint8) for image in images for _ in range(copies)]
    return dict(processor(text=[prompt] * len(repeated), images=repeated, return_tensors="pt"))


def generate(network: Any, inputs: dict[str, Tensor], tokens: int, copies: int = 1) -> Tensor:
    """Prompts and captions, some of every prompt, by ``generate`` of transformers."""
    return network.generate(
        **inputs, do_sample=True, top_k=0, top_p=1.0, num_return_sequences=copies, min_new_tokens=tokens, max_new_tokens=tokens,
        suppress_tokens=SPECIALS,
    )  # fmt: skip


def logprobs(network: Any, inputs: dict[str, Tensor], ids: Tensor, tokens: int) -> Tensor:
    """Log-probs of the captions ``[N, T]`` from the logits of whole rows."""
    full = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in full:
        full["mm_token_type_ids"] = torch.cat([full["mm_token_type_ids"], ids.new_zeros(len(ids), tokens)], 1)
    logits = network(**full, logits_to_keep=tokens + 1).logits[:, :-1].index_fill(2, torch.tensor(SPECIALS), -torch.inf)
    return logits.log_softmax(-1).gather(2, ids[:, -tokens:, None])[..., 0]
