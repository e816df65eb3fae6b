"""Prompts after which image tokens are drawn, with and without their captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenCondition:
    """Prompts after which image tokens are drawn.

    Args:
        ids_NL: Token ids of the prompts with their captions, padded on either side.
        mask_NL: 1 for tokens of ``ids_NL`` that are attended to, 0 for padding.
        uncond_ids_NL: Token ids of the prompts without their captions, for classifier-free guidance.
        uncond_mask_NL: The same as ``mask_NL`` for ``uncond_ids_NL``.
    """

    ids_NL: Tensor
    mask_NL: Tensor
    uncond_ids_NL: Tensor
    uncond_mask_NL: Tensor

    def __len__(self) -> int:
        """N, the number of rows."""
        return len(self.ids_NL)

    def index(self, rows: Sequence[int]) -> TokenCondition:
        """The condition of some of its rows."""
        at = list(rows)
        tensors = ("ids_NL", "mask_NL", "uncond_ids_NL", "uncond_mask_NL")
        return replace(self, **{name: getattr(self, name)[at] for name in tensors})


def condition_of(prompts: Sequence[Sequence[int]], negative: Sequence[int], pad_id: int) -> TokenCondition:
    """Prompts of N captions beside N copies of the negative prompt, all padded on the left to one length.

    Args:
        prompts: Token ids of every prompt.
        negative: Token ids of the prompt that guidance compares with.
        pad_id: Id of the padding token.
    """
    longest = max(len(negative), *map(len, prompts))
    ids, masks = [], []
    for rows in (prompts, [negative] * len(prompts)):
        ids.append(torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows]))
        masks.append(torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]))
    return TokenCondition(ids[0], masks[0], ids[1], masks[1])


def left_padded(condition: TokenCondition, device: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids and mask with caption, ids and mask without caption, ``[N, L]`` each.

    Padding is moved to the left, and columns that are padding in all rows of both are removed.
    """
    given = ((condition.ids_NL, condition.mask_NL), (condition.uncond_ids_NL, condition.uncond_mask_NL))
    longest = max(int(mask_NL.sum(1).max()) for _, mask_NL in given)
    moved = []
    for ids_NL, mask_NL in given:
        order_NL = mask_NL.to(device).argsort(dim=1, stable=True)[:, mask_NL.shape[1] - longest :]
        moved += [x.to(device).gather(1, order_NL) for x in (ids_NL, mask_NL)]
    ids_NL, mask_NL, uncond_NL, uncond_mask_NL = moved
    return ids_NL, mask_NL, uncond_NL, uncond_mask_NL


def positions(mask_NP: Tensor) -> Tensor:
    """Position of every token, counted without padding."""
    return (mask_NP.cumsum(1) - 1).clamp(min=0)
