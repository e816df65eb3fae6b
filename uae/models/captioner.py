"""Image to text with any Hugging Face vision-language model of the ``AutoModelForImageTextToText`` call shape.

The prompt (image included) runs once per image, in sampling and in log-probs: its key-value cache is expanded to the
group. That is exact, also in the gradient, and the image tower never sees a picture twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from uae.grpo import token_logprobs
from uae.types import Rollout, Sampling

SPECIAL_VISION_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


@dataclass(frozen=True)
class VLMContext:
    """The processor's output for B images, left-padded.

    Args:
        rows: Tensors whose first dimension is B (``input_ids``, ``attention_mask``, ``image_grid_thw``, ...).
        patches: One tensor of flattened patches per image (models that pack ``pixel_values``), or empty.
    """

    rows: dict[str, Tensor]
    patches: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        """B, the number of images."""
        return len(self.rows["input_ids"])

    def index(self, images: Sequence[int]) -> VLMContext:
        """The same context for a subset of its images."""
        patches = tuple(self.patches[i] for i in images) if self.patches else ()
        return VLMContext({key: value[list(images)] for key, value in self.rows.items()}, patches)

    def repeat(self, group: int) -> VLMContext:
        """Every image ``group`` times in a row."""
        return self.index([image for image in range(len(self)) for _ in range(group)])

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward."""
        return {**self.rows, "pixel_values": torch.cat(self.patches)} if self.patches else dict(self.rows)


@dataclass
class _Prefix:
    """A prompt that has been run: what continuing it needs."""

    cache: Any
    hidden_ND: Tensor  # of the last prompt token
    mask_NP: Tensor
    offset_N: Tensor  # position of the first caption token

    def expand(self, group: int) -> _Prefix:
        self.cache.batch_repeat_interleave(group)
        return _Prefix(
            self.cache, *(x.repeat_interleave(group, 0) for x in (self.hidden_ND, self.mask_NP, self.offset_N))
        )


class CaptionPolicy(nn.Module):
    """The trainable part of a captioner: a vision-language model that scores captions.

    It is the root that a distributed strategy shards, so everything that needs the model's own parameters (embeddings,
    final norm, output head) happens inside its ``forward``.
    """

    def __init__(self, model: nn.Module, banned_ids: Sequence[int] = ()) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("banned_ids", torch.tensor(list(banned_ids), dtype=torch.long), persistent=False)

    @property
    def base(self) -> Any:
        """The Hugging Face model, whether or not an adapter wraps it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(self, context: VLMContext, tokens_NT: Tensor, group: int, temperature: float) -> Tensor:
        """Teacher-forced log-probs ``[N, T]``, float32, with gradient."""
        prefix = self.prefill(context).expand(group)
        hidden_NTD = prefix.hidden_ND[:, None]
        if tokens_NT.shape[1] > 1:
            hidden_NTD = torch.cat([hidden_NTD, self.advance(prefix, tokens_NT[:, :-1])], dim=1)
        return self.score(hidden_NTD, tokens_NT, temperature)

    def prefill(self, context: VLMContext) -> _Prefix:
        """Run the prompt of every image once."""
        inputs, mask_BP = context.inputs(), context.rows["attention_mask"]
        if not hasattr(self.base.model, "get_rope_index"):  # by default, padding on the left would count as positions
            inputs["position_ids"] = (mask_BP.cumsum(1) - 1).clamp(min=0)
        out = self.base.model(**inputs, use_cache=True)
        offset_B = mask_BP.sum(1)
        deltas = getattr(out, "rope_deltas", None)  # multimodal rope: an image takes fewer positions than tokens
        if deltas is None:  # newer versions keep it on the model
            deltas = getattr(self.base.model, "rope_deltas", None)
        if deltas is not None:
            offset_B = offset_B + deltas.view(-1).to(offset_B.device)
        return _Prefix(out.past_key_values, out.last_hidden_state[:, -1], mask_BP, offset_B)

    def advance(self, prefix: _Prefix, tokens_NT: Tensor) -> Tensor:
        """Feed caption tokens after a prefix (whose cache grows); their final hidden states ``[N, T, D]``."""
        N, T = tokens_NT.shape
        position_NT = prefix.offset_N[:, None] + torch.arange(T, device=tokens_NT.device)
        if hasattr(self.base.model, "get_rope_index"):
            position_NT = position_NT.expand(3, N, T)
        prefix.mask_NP = torch.cat([prefix.mask_NP, prefix.mask_NP.new_ones(N, T)], dim=1)
        prefix.offset_N = prefix.offset_N + T
        out = self.base.model(
            input_ids=tokens_NT,
            attention_mask=prefix.mask_NP,
            position_ids=position_NT,
            past_key_values=prefix.cache,
            use_cache=True,
        )
        return out.last_hidden_state

    def score(self, hidden_NTD: Tensor, tokens_NT: Tensor, temperature: float) -> Tensor:
        """Log-probs ``[N, T]`` of tokens from the hidden states that predict them."""
        head = self.base.get_output_embeddings()
        logp_NT, _ = token_logprobs(
            hidden_NTD, head.weight, tokens_NT, temperature, banned=self.banned_ids, bias=getattr(head, "bias", None)
        )
        return logp_NT

    def logits(self, hidden_ND: Tensor, temperature: float) -> Tensor:
        """float32 logits ``[N, V]`` of the policy: temperature applied, banned tokens at -inf."""
        logits_NV = self.base.get_output_embeddings()(hidden_ND).float() / temperature
        return logits_NV.index_fill(1, self.banned_ids, -torch.inf)


class HFCaptioner:
    """Captions with a Hugging Face vision-language model; implements `uae.types.Captioner`.

    Args:
        model: A ``...ForConditionalGeneration``. Its shipped generation settings are ignored: they would reshape the
            sampling distribution, see `uae.types.Sampling`.
        processor: The model's processor, with a chat template.
        instruction: The question put beside every image.
        extra_banned_ids: Token ids that are never sampled, besides the vision placeholders.
    """

    def __init__(self, model: Any, processor: Any, instruction: str, extra_banned_ids: Sequence[int] = ()) -> None:
        if not getattr(processor, "chat_template", None):
            raise ValueError(
                "the captioner's processor has no chat template: point the system at an instruction-tuned checkpoint"
            )
        self.processor = processor
        self.instruction = instruction
        ids = [getattr(model.config, name, None) for name in SPECIAL_VISION_TOKENS]
        tokenizer = processor.tokenizer
        ends = model.generation_config.eos_token_id
        self.end_ids = sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_ids[0]
        pad = [self.pad_id] if self.pad_id not in self.end_ids else []
        banned = sorted({i for i in [*ids, *extra_banned_ids, *pad] if i is not None})
        for module in model.modules():  # a policy with dropout has no ratio of one
            for name in ("p", "dropout", "attention_dropout"):  # nn.Dropout's name, and those of attention
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        self.policy = CaptionPolicy(model, banned)
        self.reference_policy: CaptionPolicy | None = None  # a frozen copy, where the finetuning needs one
        self.starting_adapter: str | None = None  # name of the adapter the run started from; "" is none at all
        self._prompts: dict[str, str] = {}

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return self.policy.banned_ids.device

    def to(self, device: Any) -> HFCaptioner:
        """Move the policy (and the frozen copy, if any)."""
        self.policy.to(device)
        if self.reference_policy is not None:
            self.reference_policy.to(device)
        return self

    def prompt(self, instruction: str) -> str:
        """The chat-formatted prompt around one image."""
        if instruction not in self._prompts:
            content = [{"type": "image"}, {"type": "text", "text": instruction}]
            self._prompts[instruction] = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        return self._prompts[instruction]

    def prepare(self, images_BCHW: Tensor, instruction: str | None = None) -> VLMContext:
        """Images ``[B, 3, H, W]`` in [0, 1] (or a list of ``[3, H, W]`` of any sizes) to the model's inputs."""
        images = [(image.clamp(0, 1) * 255).round().to(torch.uint8).cpu() for image in images_BCHW]
        prompt = self.prompt(instruction or self.instruction)
        inputs = self.processor(
            text=[prompt] * len(images), images=images, padding=True, padding_side="left", return_tensors="pt"
        ).to(self.device)
        rows = dict(inputs)
        patches: tuple[Tensor, ...] = ()
        if "image_grid_thw" in rows:
            patches = rows.pop("pixel_values").split(rows["image_grid_thw"].prod(1).tolist())
        return VLMContext(rows, patches)

    @torch.no_grad()
    def sample(self, context: VLMContext, group: int, sampling: Sampling, seeds: Sequence[int]) -> Rollout:
        """``group`` captions for every image; row n depends on its image and on ``seeds[n]`` only.

        Tokens come from the inverse of the cumulative distribution at one uniform number per row and step, so a sample
        does not depend on its batch.
        """
        temperature, device = sampling.policy_temperature, self.device
        prefix = self.policy.prefill(context).expand(group)
        hidden_ND, done_N = prefix.hidden_ND, torch.zeros(len(prefix.hidden_ND), dtype=torch.bool, device=device)
        uniform_NT = _uniforms(seeds, sampling.max_tokens).to(device)
        ends = torch.tensor(self.end_ids, device=device)
        tokens, logps, masks = [], [], []
        for step in range(sampling.max_tokens):
            logp_NV = self.policy.logits(hidden_ND, temperature).log_softmax(-1)
            token_N = logp_NV.argmax(-1) if sampling.temperature == 0 else _draw(logp_NV, uniform_NT[:, step])
            token_N = token_N.masked_fill(done_N, self.pad_id)
            tokens.append(token_N)
            masks.append((~done_N).float())
            logps.append(logp_NV.gather(1, token_N[:, None])[:, 0].masked_fill(done_N, 0.0))
            done_N = done_N | torch.isin(token_N, ends)
            if done_N.all() or step + 1 == sampling.max_tokens:
                break
            hidden_ND = self.policy.advance(prefix, token_N[:, None])[:, -1]
        tokens_NT, mask_NT, logp_NT = (torch.stack(x, dim=1) for x in (tokens, masks, logps))
        return Rollout(tokens_NT, mask_NT, logp_NT, self.decode(tokens_NT, mask_NT), context, group, temperature)

    def decode(self, tokens_NT: Tensor, mask_NT: Tensor) -> list[str]:
        """Captions as plain text, without special tokens."""
        rows = [tokens[mask.bool()] for tokens, mask in zip(tokens_NT, mask_NT, strict=True)]
        return [text.strip() for text in self.processor.batch_decode(rows, skip_special_tokens=True)]

    def logprobs(self, rollout: Rollout) -> Tensor:
        """Teacher-forced log-probs ``[N, T]`` under the current weights, with gradient; 0 where masked."""
        logp_NT = self.policy(rollout.context, rollout.tokens_NT, rollout.group, rollout.temperature)
        return logp_NT.masked_fill(rollout.mask_NT == 0, 0.0)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the captioner computes with the weights the run started from."""
        if self.reference_policy is not None:
            self.policy, self.reference_policy = self.reference_policy, self.policy
            try:
                yield
            finally:
                self.policy, self.reference_policy = self.reference_policy, self.policy
        elif self.starting_adapter is not None:
            with _switched_to(self.starting_adapter, self.policy.model):
                yield
        else:
            raise RuntimeError(
                "no reference was kept: attach the finetuning with keep_reference=True (model.loss.beta > 0)"
            )


@contextmanager
def _switched_to(adapter: str, model: Any) -> Iterator[None]:
    """A PeftModel with another adapter than "default", or with none ("")."""
    if not adapter:
        with model.disable_adapter():
            yield
        return
    model.set_adapter(adapter)
    try:
        yield
    finally:
        model.set_adapter("default")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name and ".default." in name)


def _uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """Uniform numbers ``[N, steps]`` in [0, 1), float64, one independent stream per seed."""
    return torch.stack(
        [torch.rand(steps, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
    )


def _draw(logp_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the uniform number; never one of probability 0."""
    cumulative_NV = logp_NV.double().exp().cumsum(-1)
    target_N1 = (uniform_N * cumulative_NV[:, -1])[:, None]
    return torch.searchsorted(cumulative_NV, target_N1, right=True)[:, 0].clamp(max=logp_NV.shape[1] - 1)
