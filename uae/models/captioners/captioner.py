"""Image to text with any Hugging Face vision-language model of the ``AutoModelForImageTextToText`` call shape.

How to load one from a checkpoint is in `uae.models.captioners.loading`, its trainable part in `uae.models.captioners.policy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from uae.learner import Learner
from uae.models.captioners.draws import draw, entropy, uniforms
from uae.models.captioners.own_forward import adopt_logits
from uae.models.captioners.policy import CaptionPolicy, Prefix, VLMContext
from uae.models.captioners.special_tokens import sight_ids
from uae.models.captioners.steps import check_whole
from uae.models.captioners.trunk import text_decoder
from uae.models.merged import merged
from uae.types import Rollout, Sampling

LEAVING = 8  # fewest rows that leave a batch together: the others are copied then, and their numbers are rounded otherwise
COUNTED = {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"}  # of processors that count patches
TEXT = "A short text about a picture, which is read once when the captioner is loaded."


@dataclass(frozen=True)
class Frame:
    """What a prompt has beside an image and a question.

    Args:
        system: System message; None is the chat template's own, if it has one.
        lead: Text at the beginning of the user's message.
    """

    system: str | None = None
    lead: str = ""


class HFCaptioner:
    """Captions with a Hugging Face vision-language model; implements `uae.types.Captioner`.

    Args:
        model: A ``...ForConditionalGeneration``. Its shipped generation settings are ignored: they would reshape the
            sampling distribution, see `uae.types.Sampling`.
        processor: The model's processor, with a chat template.
        instruction: The question put beside every image.
        extra_banned_ids: Token ids that are never sampled, besides the vision placeholders.
        image_first: Whether the image stands before the question in the prompt; False puts it behind.
        frame: What else is in the prompt.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        instruction: str,
        extra_banned_ids: Sequence[int] = (),
        image_first: bool = True,
        frame: Frame = Frame(),  # noqa: B008 (frozen)
    ) -> None:
        if not getattr(processor, "chat_template", None):
            raise ValueError(
                "the captioner's processor has no chat template: set model.init_args.system.init_args.captioner to an "
                "instruction-tuned checkpoint"
            )
        self.processor = processor
        self.instruction, self.image_first, self.frame = instruction, image_first, frame
        tokenizer = processor.tokenizer
        ends = model.generation_config.eos_token_id
        self.end_ids = sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_ids[0]
        pad = [self.pad_id] if self.pad_id not in self.end_ids else []
        banned = sorted({*(sight_ids(model.config, processor) - {*self.end_ids}), *extra_banned_ids, *pad})
        self.learner = Learner(CaptionPolicy(model, banned))
        adopt_logits(self.learner.network, (tokenizer(TEXT, add_special_tokens=False)["input_ids"] * 8)[:8])
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
        decoder: nn.Module = text_decoder(self.learner.network.base)
        return decoder

    def to(self, device: torch.device | str) -> HFCaptioner:
        """Move the policy, and the frozen copy of its initial weights if there is one."""
        self.learner.to(device)
        return self

    def prompt(self, instruction: str) -> str:
        """The chat-formatted prompt around one image."""
        if instruction not in self._prompts:
            _check_text(instruction, self.processor)
            turns: list[dict[str, Any]] = [{"role": "user", "content": self._content(instruction)}]
            if self.frame.system is not None:
                turns.insert(0, {"role": "system", "content": [{"type": "text", "text": self.frame.system}]})
            prompt = self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            image = getattr(self.processor, "image_token", None) or "<image>"
            if prompt.count(instruction) == 1 and (prompt.find(image) < prompt.find(instruction)) != self.image_first:
                raise ValueError(
                    f"image_first={self.image_first}, but the captioner's chat template has an order of its own; set "
                    f"model.init_args.system.init_args.reading.image_first to {not self.image_first}"
                )
            self._prompts[instruction] = prompt
        return self._prompts[instruction]

    def _content(self, instruction: str) -> Any:
        """The image and the question, as the chat template takes the content of a message."""
        content = [{"type": "image"}, {"type": "text", "text": instruction}]
        lead = [{"type": "text", "text": self.frame.lead}] if self.frame.lead else []
        return lead + (content if self.image_first else content[::-1])

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

        def again(some: Sequence[int]) -> dict[str, Any]:
            return self._read([images[i] for i in some], [prompts[i] for i in some])

        rows = again(range(len(images)))
        if "image_grid_thw" in rows and rows.keys() <= COUNTED:
            patches = rows.pop("pixel_values").split(rows["image_grid_thw"].prod(1).tolist())
            return VLMContext(rows, patches, tuple(images_BCHW))
        return VLMContext(rows, images=tuple(images_BCHW), again=again)

    def _read(self, images: list[Tensor], prompts: list[str]) -> dict[str, Any]:
        """The processor's output for prompts with one image each, uint8 ``[3, H, W]``."""
        begin = self.processor.tokenizer.bos_token
        written = begin is not None and prompts[0].startswith(begin)  # by the template; the tokenizer would add a second one
        inputs = self.processor(
            text=prompts,
            images=[[image] for image in images],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **({"add_special_tokens": False} if written else {}),
        )
        return dict(inputs.to(self.device))

    @torch.no_grad()
    def sample(self, context: VLMContext, group: int, sampling: Sampling, seeds: Sequence[int]) -> Rollout[VLMContext]:
        """``group`` captions for every image; row n depends on its image and on ``seeds[n]`` only.

        Tokens come from the inverse of the cumulative distribution at one uniform number per row and step, so a sample
        does not depend on its batch. Rows that have ended leave the batch, a quarter of it at a time.
        """
        policy = self.learner.network
        if policy.compile_steps:
            check_whole(policy.model)
        prompt = policy.prefill(context, keep_features=True)
        prefix = prompt.expand(group, sampling.max_tokens - 1, policy.compile_steps)
        with merged(policy.model):
            tokens_NT, mask_NT, logp_NT, entropy_NT = self._draw(prefix, sampling, seeds)
        return Rollout(
            mask_RS=mask_NT,
            logp_RS=logp_NT,
            entropy_RS=entropy_NT,
            tokens_NT=tokens_NT,
            texts=self.decode(tokens_NT, mask_NT),
            context=replace(context, features=prompt.features),
            group=group,
            temperature=sampling.policy_temperature,
        )

    def _draw(self, prefix: Prefix, sampling: Sampling, seeds: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, mask, log-probs and entropies, ``[N, T]`` each, up to the end of the longest caption."""
        policy, device = self.learner.network, self.device
        layer = policy.output_layer(sampling.policy_temperature)
        uniform_NT, ends = uniforms(seeds, sampling.max_tokens).to(device), torch.tensor(self.end_ids, device=device)
        hidden_RD, row_R = prefix.hidden_ND, torch.arange(len(uniform_NT), device=device)
        open_R = torch.ones_like(row_R, dtype=torch.bool)
        record = _Record(uniform_NT.shape, self.pad_id, hidden_RD)
        for step in range(sampling.max_tokens):
            logp_RV = layer(hidden_RD).log_softmax(-1)
            token_R = logp_RV.argmax(-1) if sampling.temperature == 0 else draw(logp_RV, uniform_NT[row_R, step])
            record.note(step, row_R, open_R, token_R, logp_RV)
            open_R = open_R & ~torch.isin(token_R, ends)
            left = int(open_R.sum())
            if left == 0 or step + 1 == sampling.max_tokens:
                break
            if prefix.places is None and len(open_R) - left >= max(LEAVING, len(open_R) / 4):
                kept_K = open_R.nonzero()[:, 0]
                prefix.keep(kept_K)
                row_R, token_R, open_R = row_R[kept_K], token_R[kept_K], open_R[kept_K]
            hidden_RD = policy.advance(prefix, token_R[:, None])[:, -1]
        return record.until(step + 1)

    def decode(self, tokens_NT: Tensor, mask_NT: Tensor) -> list[str]:
        """Captions as plain text, without special tokens."""
        rows = [tokens[mask.bool()] for tokens, mask in zip(tokens_NT, mask_NT, strict=True)]
        return [text.strip() for text in self.processor.batch_decode(rows, skip_special_tokens=True)]

    def logprobs(self, rollout: Rollout[VLMContext]) -> Tensor:
        """Teacher-forced log-probs ``[N, T]`` under the current weights, with gradient; 0 where masked."""
        length_N = (rollout.mask_RS != 0).sum(1)
        logp_NT: Tensor = self.learner.network(rollout.context, rollout.tokens_NT, rollout.group, rollout.temperature, length_N)
        return logp_NT.masked_fill(rollout.mask_RS == 0, 0.0)


class _Record:
    """What is known of N captions of up to T tokens while they are drawn.

    Args:
        shape: N and T.
        pad_id: The token that stands behind the end of a caption.
        hidden: Hidden states that captions come from; log-probs are on their device, in their data type or in float32.
    """

    def __init__(self, shape: torch.Size, pad_id: int, hidden: Tensor) -> None:
        self.pad_id = pad_id
        self.tokens_NT = torch.full(shape, pad_id, dtype=torch.long, device=hidden.device)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.mask_NT, self.logp_NT, self.entropy_NT = (torch.zeros(shape, dtype=dtype, device=hidden.device) for _ in range(3))

    def note(self, step: int, row_R: Tensor, open_R: Tensor, token_R: Tensor, logp_RV: Tensor) -> None:
        """Write down a token of every row that has not ended."""
        self.tokens_NT[row_R, step] = token_R.masked_fill(~open_R, self.pad_id)
        self.mask_NT[row_R, step] = open_R.to(self.mask_NT.dtype)
        self.logp_NT[row_R, step] = logp_RV.gather(1, token_R[:, None])[:, 0].masked_fill(~open_R, 0.0)
        self.entropy_NT[row_R, step] = entropy(logp_RV).masked_fill(~open_R, 0.0)

    def until(self, end: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, mask, log-probs and entropies of the first steps."""
        logp_NT, entropy_NT = self.logp_NT[:, :end].contiguous(), self.entropy_NT[:, :end].contiguous()
        return self.tokens_NT[:, :end].contiguous(), self.mask_NT[:, :end].contiguous(), logp_NT, entropy_NT


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
