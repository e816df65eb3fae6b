"""Log-probs of captions by the library alone: its chat template, its processor on one image, one pass of its model, no cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from uae.models.captioners.captioner import HFCaptioner
from uae.types import Rollout


def alone(captioner: HFCaptioner, image: Tensor, instruction: str) -> dict[str, Any]:
    """The inputs for one image ``[3, H, W]`` in [0, 1] and one question, as transformers prepares a conversation."""
    from torchvision.transforms.functional import to_pil_image

    content = [{"type": "image", "image": to_pil_image(image)}, {"type": "text", "text": instruction}]
    inputs = captioner.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    return {name: value for name, value in inputs.items() if name != "labels"}


def plain_logprobs(captioner: HFCaptioner, images: Sequence[Tensor], instructions: Sequence[str], rollout: Rollout[Any]) -> Tensor:
    """Log-probs ``[N, T]`` of a rollout's captions, differentiable; 0 where masked."""
    policy, rows = captioner.learner.network, []
    suffix = 1 if policy.base.config.model_type == "paligemma" else 0  # marks what only looks back
    for n, (tokens, mask) in enumerate(zip(rollout.tokens_NT, rollout.mask_RS, strict=True)):
        said_1L = tokens[None, : int(mask.sum())]
        inputs = alone(captioner, images[n // rollout.group], instructions[n // rollout.group])
        behind = {"input_ids": said_1L, "attention_mask": torch.ones_like(said_1L), "mm_token_type_ids": torch.zeros_like(said_1L)}
        behind["token_type_ids"] = torch.full_like(said_1L, suffix)
        inputs |= {name: torch.cat([inputs[name], more], dim=1) for name, more in behind.items() if name in inputs}
        inputs = {name: x.to(policy.base.dtype) if torch.is_floating_point(x) else x for name, x in inputs.items()}
        logits_LV = policy.base(**inputs, use_cache=False).logits[0, -said_1L.shape[1] - 1 : -1].float() / rollout.temperature
        banned = torch.zeros(logits_LV.shape[1], dtype=torch.bool)
        banned[policy.banned_ids[policy.banned_ids < len(banned)]] = True
        logp_L = logits_LV.masked_fill(banned, -torch.inf).log_softmax(-1).gather(1, said_1L.T)[:, 0]
        rows.append(torch.nn.functional.pad(logp_L, (0, len(tokens) - len(logp_L))))
    return torch.stack(rows)
