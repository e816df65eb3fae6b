"""CPU seconds of a whole step of the miniature beside the plain composition of the same libraries.

    python benchmarks/speed/miniature_step.py

Eight scenes, eight captions of each, one reconstruction of each caption, CLIP's similarity as the reward, two optimizer steps.
The plain composition is what one writes first: ``generate`` of transformers with a row for every caption, a call of the
diffusers pipeline for all captions, PIL images through open_clip's own preprocessing, and an update on whole rows. The third
is TRL's trainer, if it is installed, with the same drawing in its reward function. All start from the shipped weights and draw
captions of their own, so the lengths of their captions differ a little. None may write a token that stands for an image: the model
of transformers refuses such a caption.

The captioner reads a scene at its own 24 pixels a side, which are 9 image tokens, and then, with everything else as before, at 96
pixels, which are 144. The second case is nearer to real systems, where an image has hundreds of tokens and a caption a hundred.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from contestants import Clock, Steps
from racing import alone, median, report, table
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from uae.grpo import GRPOLoss
from uae.miniature.scenes import render, scene_of
from uae.miniature.tiny import INSTRUCTION, WEIGHTS, Tiny, TinyCLIP, load_captioner, load_decoder, processor
from uae.models.finetune import LoRA
from uae.module import UnifiedGRPO
from uae.rewards import EncoderSimilarity, WeightedReward
from uae.types import UMM, Sampling

IMAGES, GROUP, TOKENS, HALVES = 8, 8, 32, 2
SIDES = {24: 2, 96: 1}  # pixels of a side of what the captioner reads, and rounds: the second takes minutes
PLACEHOLDERS = processor().tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])


def scenes(rollout: int) -> Tensor:
    """The images of a rollout, ``[B, 3, H, W]``."""
    return render([scene_of(IMAGES * rollout + n, "train") for n in range(IMAGES)])


@dataclass
class System:
    """The miniature, whose captioner reads images of another size."""

    side: int

    def build(self) -> UMM:
        """Load it."""
        umm = Tiny().build()
        umm.captioner.processor = processor(self.side)
        return umm


def ours(rollouts: int, side: int) -> dict[str, Any]:
    """`uae.module.UnifiedGRPO` under Lightning's trainer."""
    batches = [{"image": scenes(n), "id": torch.arange(IMAGES) + IMAGES * n} for n in range(rollouts) for _ in range(HALVES)]
    module = UnifiedGRPO(
        System(side), WeightedReward({"clip": EncoderSimilarity(TinyCLIP())}, {"clip": 1.0}), LoRA(rank=16),
        loss=GRPOLoss(beta=0.0), sampling=Sampling(max_tokens=TOKENS), group=GROUP, mini_batches=HALVES,
    )  # fmt: skip
    clock = Steps()

    class EveryRollout(Clock):
        def on_train_batch_end(self, *args: Any) -> None:
            if args[-1] % HALVES == HALVES - 1:
                self.steps.mark()

    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=HALVES * rollouts, callbacks=[EveryRollout(clock)], gradient_clip_val=1.0,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return clock.report()


class Painter:
    """Captions to rewards, by a pipeline of diffusers and open_clip as they come."""

    def __init__(self) -> None:
        import open_clip

        self.reader, renderer = load_decoder(WEIGHTS / "decoder", 4, 1.0)
        self.pipe = renderer.pipe
        self.clip, _, self.prepare = open_clip.create_model_and_transforms(f"local-dir:{WEIGHTS / 'clip'}")
        self.clip.eval()

    @torch.no_grad()
    def rewards(self, texts: list[str], sources: list[Any]) -> Tensor:
        """The similarity ``[N]`` of every drawn caption to its source."""
        condition = self.reader.encode([text.strip() for text in texts])
        drawn = self.pipe(
            prompt_embeds=condition.embeds_NLD, pooled_prompt_embeds=condition.pooled_NP, height=24, width=24,
            num_inference_steps=4, guidance_scale=1.0,
        ).images  # fmt: skip
        both = [self.clip.encode_image(torch.stack([self.prepare(one) for one in some])) for some in (sources, drawn)]
        return torch.cosine_similarity(*both)


def trl(rollouts: int, side: int) -> dict[str, Any]:
    """TRL's ``GRPOTrainer``; the number of optimizer steps of a rollout is the same."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    clock, painter = Steps(), Painter()
    images = [to_pil_image(image) for number in range(rollouts) for image in scenes(number)]
    prompt = [{"role": "user", "content": INSTRUCTION}]
    rows = Dataset.from_dict({"prompt": [prompt] * len(images), "image": images})

    class Marks(TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, *args: Any, **kwargs: Any) -> None:
            if state.global_step % HALVES == 0:
                clock.mark()

    def reward(completions: list[Any], image: list[Any], **_: Any) -> list[float]:
        return painter.rewards([one[0]["content"] for one in completions], image).tolist()

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=IMAGES * GROUP // HALVES, steps_per_generation=HALVES,
            num_generations=GROUP, max_completion_length=TOKENS, beta=0.0, max_steps=HALVES * rollouts, report_to="none",
            use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", logging_strategy="no", disable_tqdm=True,
            loss_type="grpo", learning_rate=1e-3, max_grad_norm=1.0, dataloader_num_workers=0,
            generation_kwargs={"suppress_tokens": PLACEHOLDERS},
        )  # fmt: skip
        GRPOTrainer(
            model=load_captioner(WEIGHTS / "captioner"), args=config, train_dataset=rows, callbacks=[Marks()],
            processing_class=processor(side), reward_funcs=reward,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        ).train()  # fmt: skip
    return clock.report()


def plain(rollouts: int, side: int) -> dict[str, Any]:
    """The plain composition."""
    from peft import LoraConfig, get_peft_model

    network: Any = get_peft_model(load_captioner(WEIGHTS / "captioner"), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    reader, painter = processor(side), Painter()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    content = [{"type": "image"}, {"type": "text", "text": INSTRUCTION}]
    prompt = reader.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    clock = Steps()
    for number in range(rollouts):
        sources = [to_pil_image(image) for image in scenes(number) for _ in range(GROUP)]
        inputs = dict(reader(text=[prompt] * len(sources), images=sources, return_tensors="pt"))
        with torch.no_grad():
            ids = network.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=TOKENS, suppress_tokens=PLACEHOLDERS)
            tokens = ids[:, inputs["input_ids"].shape[1] :]
            texts = reader.batch_decode(tokens, skip_special_tokens=True)
            reward = painter.rewards(texts, sources).view(IMAGES, GROUP)
        advantage = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-6)).view(-1, 1)
        mask = torch.cat([torch.ones_like(tokens[:, :1]), (tokens != reader.tokenizer.eos_token_id)[:, :-1].cumprod(1)], 1)
        with torch.no_grad():
            old = _logprobs(network, inputs, ids, tokens, slice(None))
        for half in range(HALVES):
            rows = slice(half * len(ids) // HALVES, (half + 1) * len(ids) // HALVES)
            ratio = (_logprobs(network, inputs, ids, tokens, rows) - old[rows]).exp()
            gain = torch.min(ratio * advantage[rows], ratio.clamp(0.8, 1.2) * advantage[rows])
            loss = -((gain * mask[rows]).sum(1) / mask[rows].sum(1)).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        clock.mark()
    return clock.report()


def _logprobs(network: Any, inputs: dict[str, Tensor], ids: Tensor, tokens: Tensor, rows: slice) -> Tensor:
    patches = len(inputs["pixel_values"]) // len(ids)
    start, stop, _ = rows.indices(len(ids))
    full = {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows]), "image_grid_thw": inputs["image_grid_thw"][rows]}
    full["pixel_values"] = inputs["pixel_values"][start * patches : stop * patches]
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"][rows]
        full["mm_token_type_ids"] = torch.cat([types, types.new_zeros(len(types), tokens.shape[1])], 1)
    logits = network(**full, logits_to_keep=tokens.shape[1] + 1).logits[:, :-1]
    return logits.log_softmax(-1).gather(2, tokens[rows, :, None])[..., 0]


CONTESTANTS = {"ours": ours, "plain": plain, **({"trl": trl} if importlib.util.find_spec("trl") else {})}


def race(side: int, rollouts: int, rounds: int) -> dict[str, Any]:
    """All in turns."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    for number in range(rounds):
        for name in sorted(found, reverse=bool(number % 2)):
            found[name].append(alone(__file__, "--contestant", name, "--rollouts", str(rollouts), "--sides", str(side)))
    seconds = {name: median([median(run["cpu"]) for run in runs]) for name, runs in found.items()}
    memory = {name: median([run["peak_mib"] for run in runs]) for name, runs in found.items()}
    print(side, {name: round(second, 3) for name, second in seconds.items()}, flush=True)
    return {"side": side, "seconds": seconds, "peak_mib": memory, "runs": found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=5, help="rollouts of a process; the first is not counted")
    parser.add_argument("--rounds", type=int, help="of every side; None is as many as the side has above")
    parser.add_argument(
        "--sides", type=int, nargs="+", default=list(SIDES), help="pixels of a side of the images that the captioner reads"
    )
    parser.add_argument("--contestant", choices=list(CONTESTANTS), help="only this one, once, as JSON")
    arguments = parser.parse_args()
    if arguments.contestant:
        torch.set_num_threads(1)
        print(json.dumps(CONTESTANTS[arguments.contestant](arguments.rollouts, arguments.sides[0])))
        sys.exit()
    races = [race(side, arguments.rollouts, arguments.rounds or SIDES.get(side, 1)) for side in arguments.sides]
    rows = [
        [str((one["side"] // 8) ** 2), name, second, second / one["seconds"]["ours"], one["peak_mib"][name]]
        for one in races
        for name, second in one["seconds"].items()
    ]
    lines = table(["Image tokens", "Whole step of the miniature", "s", "of ours", "peak above start, MiB"], rows)
    report("miniature_step", "python benchmarks/speed/miniature_step.py", lines, races)
