"""Image to text with any Hugging Face vision-language model of the ``AutoModelForImageTextToText`` call shape.

How to load one from a checkpoint is in `uae.models.captioners.loading`, its trainable part in `uae.models.captioners.policy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from uae.learner import Learner
from uae.models.captioners.draws import draw, entropy, uniforms
from uae.models.captioners.policy import CaptionPolicy, VLMContext
from uae.types import Rollout, Sampling

SPECIAL_VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


class HFCaptioner:
    """Captions with a Hugging Face vision-language model; implements `uae.types.Captioner`.

    Args:
        model: A ``...ForConditionalGeneration``. Its shipped generation settings are ignored: they would reshape the
            sampling distribution, see `uae.types.Sampling`.
        processor: The model's processor, with a chat template.
        instruction: The question put beside every image.
        extra_banned_ids: Token ids that are never sampled, besides the vision placeholders.
        image_first: Whether the image stands before the question in the prompt; False puts it behind.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        instruction: str,
        extra_banned_ids: Sequence[int] = (),
        image_first: bool = True,
    ) -> None:
        if not getattr(processor, "chat_template", None):
            raise ValueError(
                "the captioner's processor has no chat template: set model.init_args.system.init_args.captioner to an "
                "instruction-tuned checkpoint"
            )
        self.processor = processor
        self.instruction, self.image_first = instruction, image_first
        ids = [getattr(model.config, name, None) for name in SPECIAL_VISION_TOKENS]
        for name in ("image_token_ids", "video_token_ids"):  # of the processor; some surround an image with more of them
            ids += getattr(processor, name, None) or []
        tokenizer = processor.tokenizer
        ends = model.generation_config.eos_token_id
        self.end_ids = sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_ids[0]
        pad = [self.pad_id] if self.pad_id not in self.end_ids else []
        banned = sorted({i for i in [*ids, *extra_banned_ids, *pad] if i is not None})
        self.learner = Learner(CaptionPolicy(model, banned))
        self._prompts: dict[str, str] = {}

    @property
    def device(self) -> torch.device:
        """The device that the policy is on."""
        return self.learner.network.banned_ids.device

    @property
    def language_model(self) -> nn.Module:
        """The text decoder with the current weights, adapter included; it maps token ids or embeddings to hidden states.

        Its ``last_hidden_state`` is taken after the final norm. Positions are counted from the first token, so a caller
        pads on the right or passes ``position_ids``.
        """
        decoder: nn.Module = self.learner.network.base.get_decoder()
        return decoder

    def to(self, device: torch.device | str) -> HFCaptioner:
        """Move the policy, and the frozen copy of its initial weights if there is one."""
        self.learner.to(device)
        return self

    def prompt(self, instruction: str) -> str:
        """The chat-formatted prompt around one image."""
        if instruction not in self._prompts:
            _check_text(instruction, self.processor)
            content = [{"type": "image"}, {"type": "text", "text": instruction}]
            turn = {"role": "user", "content": content if self.image_first else content[::-1]}
            prompt = self.processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
            image = getattr(self.processor, "image_token", None) or "<image>"
            if prompt.count(instruction) == 1 and (prompt.find(image) < prompt.find(instruction)) != self.image_first:
                raise ValueError(
                    f"image_first={self.image_first}, but the captioner's chat template has an order of its own; set "
                    f"model.init_args.system.init_args.reading.image_first to {not self.image_first}"
                )
            self._prompts[instruction] = prompt
        return self._prompts[instruction]

    def prompts(self, instruction: str | Sequence[str] | None, images: int) -> list[str]:
        """One prompt per image. ``instruction`` is one for all images or one per image; None is the captioner's own."""
        asked = self.instruction if instruction is None else instruction
        return [self.prompt(one) for one in ([asked] * images if isinstance(asked, str) else asked)]

    def prepare(self, images_BCHW: Tensor, instruction: str | Sequence[str] | None = None) -> VLMContext:
        """Images ``[B, 3, H, W]`` in [0, 1] (or a list of ``[3, H, W]`` of any sizes) to the model's inputs.

        ``instruction`` is one for all, or one per image.
        """
        images = [(image.clamp(0, 1) * 255).round().to(torch.uint8).cpu() for image in images_BCHW]
        prompts = self.prompts(instruction, len(images))
        inputs = self.processor(
            text=prompts, images=images, padding=True, padding_side="left", return_tensors="pt"
        ).to(self.device)
        rows, patches = dict(inputs), ()
        if "image_grid_thw" in rows:
            patches = rows.pop("pixel_values").split(rows["image_grid_thw"].prod(1).tolist())
        elif len(rows["pixel_values"]) != len(images):  # tiles, each of the same number of tokens
            tokens_B = (rows["input_ids"] == self.learner.network.base.config.image_token_id).sum(1)
            tiles_B = tokens_B * len(rows["pixel_values"]) // tokens_B.sum()
            if tiles_B.sum() != len(rows["pixel_values"]):
                raise ValueError(
                    f"{type(self.processor).__name__} makes {len(rows['pixel_values'])} tiles of {len(images)} images, not "
                    "all with the same number of tokens; set model.init_args.system.init_args.captioner to another model"
                )
            patches = rows.pop("pixel_values").split(tiles_B.tolist())
        return VLMContext(rows, patches, tuple(images_BCHW))

    @torch.no_grad()
    def sample(
        self, context: VLMContext, group: int, sampling: Sampling, seeds: Sequence[int]
    ) -> Rollout[VLMContext]:
        """``group`` captions for every image; row n depends on its image and on ``seeds[n]`` only.

        Tokens come from the inverse of the cumulative distribution at one uniform number per row and step, so a sample
        does not depend on its batch.
        """
        policy, temperature, device = self.learner.network, sampling.policy_temperature, self.device
        prompt = policy.prefill(context)
        context = replace(context, features=prompt.features)
        prefix = prompt.expand(group)
        hidden_ND, done_N = prefix.hidden_ND, torch.zeros(len(prefix.hidden_ND), dtype=torch.bool, device=device)
        uniform_NT = uniforms(seeds, sampling.max_tokens).to(device)
        ends = torch.tensor(self.end_ids, device=device)
        tokens, logps, entropies, masks = [], [], [], []
        for step in range(sampling.max_tokens):
            logp_NV = policy.logits(hidden_ND, temperature).log_softmax(-1)
            token_N = logp_NV.argmax(-1) if sampling.temperature == 0 else draw(logp_NV, uniform_NT[:, step])
            token_N = token_N.masked_fill(done_N, self.pad_id)
            tokens.append(token_N)
            masks.append((~done_N).float())
            logps.append(logp_NV.gather(1, token_N[:, None])[:, 0].masked_fill(done_N, 0.0))
            entropies.append(entropy(logp_NV).masked_fill(done_N, 0.0))
            done_N = done_N | torch.isin(token_N, ends)
            if done_N.all() or step + 1 == sampling.max_tokens:
                break
            hidden_ND = policy.advance(prefix, token_N[:, None])[:, -1]
        tokens_NT, mask_NT = torch.stack(tokens, dim=1), torch.stack(masks, dim=1)
        return Rollout(
            mask_RS=mask_NT,
            logp_RS=torch.stack(logps, dim=1),
            entropy_RS=torch.stack(entropies, dim=1),
            tokens_NT=tokens_NT,
            texts=self.decode(tokens_NT, mask_NT),
            context=context,
            group=group,
            temperature=temperature,
        )

    def decode(self, tokens_NT: Tensor, mask_NT: Tensor) -> list[str]:
        """Captions as plain text, without special tokens."""
        rows = [tokens[mask.bool()] for tokens, mask in zip(tokens_NT, mask_NT, strict=True)]
        return [text.strip() for text in self.processor.batch_decode(rows, skip_special_tokens=True)]

    def logprobs(self, rollout: Rollout[VLMContext]) -> Tensor:
        """Teacher-forced log-probs ``[N, T]`` under the current weights, with gradient; 0 where masked."""
        logp_NT: Tensor = self.learner.network(rollout.context, rollout.tokens_NT, rollout.group, rollout.temperature)
        return logp_NT.masked_fill(rollout.mask_RS == 0, 0.0)


def _check_text(instruction: str, processor: Any) -> None:
    """Refuse tokens that stand for an image or for the end of a turn.

    Raises:
        ValueError: The instruction has some.
    """
    tokenizer = processor.tokenizer
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= {getattr(processor, name, None) for name in ("image_token", "video_token")} - {None}
    if found := sorted(token for token in special if token in instruction):
        raise ValueError(
            f"the instruction {instruction!r} has the special token {found[0]!r}; allowed: text without special tokens, which are "
            "added where they belong; change model.init_args.instruction, or model.init_args.system.init_args.reading.instruction"
        )
