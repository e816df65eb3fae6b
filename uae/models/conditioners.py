"""Caption text to whatever a renderer is conditioned on. The image is never seen: text is the bottleneck."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uae.types import Rollout


@dataclass(frozen=True)
class TextCondition:
    """Plain captions, for pipelines that bring their own text encoders."""

    texts: list[str]

    def __len__(self) -> int:
        """N, the number of rows."""
        return len(self.texts)

    def index(self, rows: Sequence[int]) -> TextCondition:
        """The condition of some of its rows."""
        return TextCondition([self.texts[row] for row in rows])


@dataclass(frozen=True)
class EmbeddingCondition:
    """Embeddings per caption token.

    Args:
        embeds_NLD: Padded on the right; positions where the mask is 0 are ignored by the renderer.
        mask_NL: 1 for real tokens.
        pooled_NP: One vector per caption, or None.
    """

    embeds_NLD: Tensor
    mask_NL: Tensor
    pooled_NP: Tensor | None = None

    def __len__(self) -> int:
        """N, the number of rows."""
        return len(self.embeds_NLD)

    def index(self, rows: Sequence[int]) -> EmbeddingCondition:
        """The condition of some of its rows."""
        at = list(rows)
        pooled = None if self.pooled_NP is None else self.pooled_NP[at]
        return EmbeddingCondition(self.embeds_NLD[at], self.mask_NL[at], pooled)


class TextConditioner:
    """Hands the caption over as text."""

    truncated = 0

    def encode(self, texts: list[str], rollout: Rollout | None = None) -> TextCondition:
        """N captions to N rows."""
        return TextCondition(list(texts))

    def to(self, device: Any) -> TextConditioner:
        """Nothing to move."""
        return self


def mlp_projector(width_in: int, width: int, width_out: int) -> nn.Sequential:
    """Linear, GELU, Linear: the projector g of the paper (UMM-1), from hidden states to the renderer's conditioning."""
    return nn.Sequential(nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width_out))


class HiddenStateConditioner(nn.Module):
    """Final hidden states of a language model that reads the caption, through an MLP projector (paper: c = g(h_T)).

    Args:
        language_model: A decoder-only Hugging Face model; called with ``input_ids`` and ``attention_mask``.
        tokenizer: Its tokenizer.
        projector: Maps ``[..., D]`` to the renderer's embedding width.
        template: Text around the caption; must contain "{caption}".
        max_tokens: Longest encoded caption; a longer one is an error, never silently cut.
        pooled: "mean" of the projected embeddings, or "none".
    """

    def __init__(
        self,
        language_model: nn.Module,
        tokenizer: Any,
        projector: nn.Module,
        template: str = "{caption}",
        max_tokens: int = 512,
        pooled: Literal["mean", "none"] = "mean",
    ) -> None:
        super().__init__()
        self.truncated = 0
        if "{caption}" not in template:
            raise ValueError(f"conditioner template {template!r} has no {{caption}}")
        self.language_model, self.projector = language_model, projector
        self.tokenizer, self.template, self.max_tokens, self.pooled = tokenizer, template, max_tokens, pooled

    def encode(self, texts: list[str], rollout: Rollout | None = None) -> EmbeddingCondition:
        """N captions to embeddings, right-padded; a row does not depend on the padding."""
        prompts = [self.template.format(caption=text) for text in texts]
        batch = self.tokenizer(
            prompts, padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False
        )
        ids_NL, mask_NL = batch["input_ids"], batch["attention_mask"]
        if ids_NL.shape[1] > self.max_tokens:
            raise ValueError(
                f"a caption has {ids_NL.shape[1]} tokens; the conditioner takes {self.max_tokens}: raise max_tokens"
            )
        device = next(self.projector.parameters()).device
        ids_NL, mask_NL = ids_NL.to(device), mask_NL.to(device)
        hidden_NLD = self.language_model(input_ids=ids_NL, attention_mask=mask_NL).last_hidden_state
        embeds_NLD = self.projector(hidden_NLD) * mask_NL[..., None]
        pooled = None
        if self.pooled == "mean":
            pooled = embeds_NLD.sum(1) / mask_NL.sum(1, keepdim=True)
        return EmbeddingCondition(embeds_NLD, mask_NL, pooled)


def pad_to_length(condition: EmbeddingCondition, length: int) -> EmbeddingCondition:
    """Zero-pad the token dimension on the right up to ``length``."""
    missing = length - condition.embeds_NLD.shape[1]
    if missing <= 0:
        return condition
    embeds = torch.nn.functional.pad(condition.embeds_NLD, (0, 0, 0, missing))
    return EmbeddingCondition(embeds, torch.nn.functional.pad(condition.mask_NL, (0, missing)), condition.pooled_NP)
