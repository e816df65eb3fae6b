"""A conditioner that concatenates the tokens of several conditioners."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from uae.models.conditioners.states import EmbeddingCondition
from uae.types import Conditioner, Rollout


class JoinedConditioner(nn.Module):
    """Concatenates the token embeddings of its parts and moves all padding to the right end.

    UniWorld-V1 uses it for T5's states of the caption, the projected states of the language model and CLIP's pooled vector.

    Args:
        parts: Conditioners whose embeddings have the same width, in the order of their tokens.
        pooled_from: Index of the part whose pooled vector is used; None for no pooled vector.
    """

    def __init__(self, parts: Sequence[Conditioner], pooled_from: int | None = None) -> None:
        super().__init__()
        if not parts:
            raise ValueError("a joined conditioner needs one part or more; its parts are empty")
        if pooled_from is not None and pooled_from not in range(len(parts)):
            raise ValueError(f"pooled_from={pooled_from}; allowed: None or 0 to {len(parts) - 1}, the number of a part")
        self.pooled_from = pooled_from
        self._order = tuple(parts)
        self.parts = nn.ModuleDict({str(n): part for n, part in enumerate(parts) if isinstance(part, nn.Module)})

    @property
    def truncated(self) -> int:
        """Number of captions cut so far, summed over the parts. A caption that two parts cut counts twice."""
        return sum(part.truncated for part in self._order)

    def to(self, *args: Any, **kwargs: Any) -> JoinedConditioner:
        """Move every part, including parts that are not modules."""
        for part in self._order:
            part.to(*args, **kwargs)
        return self

    def encode(self, texts: list[str], rollout: Rollout[Any] | None = None) -> EmbeddingCondition:
        """The tokens of all parts for N captions, right-padded, on the device of the first part.

        Raises:
            ValueError: A part gives no embeddings, the widths differ, or the part ``pooled_from`` has no pooled vector.
        """
        conditions: list[EmbeddingCondition] = []
        for part in self._order:
            condition = part.encode(texts, rollout)
            if not isinstance(condition, EmbeddingCondition):
                raise ValueError(f"{type(part).__name__} gives no embeddings, so it cannot be part of a joined conditioner")
            conditions.append(condition)
        widths = [condition.embeds_NLD.shape[2] for condition in conditions]
        if len(set(widths)) > 1:
            raise ValueError(f"the joined conditioner's parts have widths {widths}; they must be equal")
        device = conditions[0].embeds_NLD.device
        embeds_NLD = torch.cat([condition.embeds_NLD.to(device) for condition in conditions], dim=1)
        mask_NL = torch.cat([condition.mask_NL.to(device, torch.long) for condition in conditions], dim=1)
        return EmbeddingCondition(*_compact(embeds_NLD, mask_NL), self._pooled(conditions, device))

    def _pooled(self, conditions: list[EmbeddingCondition], device: torch.device) -> Tensor | None:
        if self.pooled_from is None:
            return None
        pooled_NP = conditions[self.pooled_from].pooled_NP
        if pooled_NP is None:
            name = type(self._order[self.pooled_from]).__name__
            raise ValueError(f"pooled_from={self.pooled_from}, but that part ({name}) has no pooled vector")
        return pooled_NP.to(device)


def _compact(embeds_NLD: Tensor, mask_NL: Tensor) -> tuple[Tensor, Tensor]:
    """Move real tokens to the front of each row, in order, and cut the rows to the length of the longest."""
    length = int(mask_NL.sum(1).max())
    order_NL = (mask_NL == 0).long().argsort(dim=1, stable=True)[:, :length]
    return embeds_NLD.take_along_dim(order_NL[..., None], 1), mask_NL.gather(1, order_NL)
