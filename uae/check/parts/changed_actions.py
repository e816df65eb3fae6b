"""Actions made from those that a policy took: one row alone, rows cut short, and rows whose later actions are others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from uae.types import Rollout


def lengths(mask_RS: Tensor) -> list[int]:
    """Number of actions of every row."""
    return [int(length) for length in (mask_RS != 0).sum(1)]


def alone(rollout: Rollout[Any], row: int) -> Rollout[Any]:
    """One caption as a rollout of its own, without the padding that longer captions gave it."""
    own = rollout.of([row // rollout.group], rollout.group)
    at, length = row % rollout.group, max(1, lengths(rollout.mask_RS)[row])
    return replace(
        own,
        mask_RS=own.mask_RS[at : at + 1, :length],
        logp_RS=own.logp_RS[at : at + 1, :length],
        entropy_RS=None if own.entropy_RS is None else own.entropy_RS[at : at + 1, :length],
        tokens_NT=own.tokens_NT[at : at + 1, :length],
        texts=own.texts[at : at + 1],
        group=1,
    )


def cut_short(rollout: Rollout[Any]) -> Rollout[Any]:
    """The captions, cut to a third, two thirds and all of their length in turn. Tokens behind the cut are other ones, not padding."""
    share = [(row % 3 + 1) / 3 for row in range(len(rollout))]
    kept = [max(1, round(part * length)) for part, length in zip(share, lengths(rollout.mask_RS), strict=True)]
    at_T = torch.arange(rollout.mask_RS.shape[1], device=rollout.mask_RS.device)
    mask_RS = rollout.mask_RS * (at_T < torch.tensor(kept, device=at_T.device)[:, None])
    words = [text.split() for text in rollout.texts]
    texts = [" ".join(row[: max(1, round(part * len(row)))]) for part, row in zip(share, words, strict=True)]
    tokens_NT = torch.where(mask_RS.bool(), rollout.tokens_NT, other_values(rollout.tokens_NT, rollout.mask_RS))
    return replace(rollout, mask_RS=mask_RS, tokens_NT=tokens_NT, texts=texts)


def middles(mask_RS: Tensor) -> Tensor:
    """Number ``[R]`` of the first action of the second half of every row; at least 1."""
    return ((mask_RS != 0).sum(1) // 2).clamp(min=1)


def changed_from(actions_RS: Tensor, mask_RS: Tensor, first_R: Tensor) -> Tensor:
    """The actions, of which those from ``first_R`` on are others that the policy might have taken."""
    at_S = torch.arange(mask_RS.shape[1], device=mask_RS.device)
    later_RS = (at_S >= first_R[:, None]) & mask_RS.bool()
    where = later_RS.view(*later_RS.shape, *[1] * (actions_RS.ndim - 2))
    return torch.where(where, other_values(actions_RS, mask_RS), actions_RS)


def other_values(actions_RS: Tensor, mask_RS: Tensor) -> Tensor:
    """Another action in every place: numbers get noise, tokens become another of those that were drawn and did not end a row.

    Where only one token was drawn, it stays.
    """
    if actions_RS.is_floating_point():
        noise = torch.Generator().manual_seed(0)
        return actions_RS + torch.randn(actions_RS.shape, generator=noise).to(actions_RS)
    inner_RS = mask_RS.bool().clone()
    inner_RS[:, :-1] &= mask_RS[:, 1:].bool()  # the last token of a row may be its end
    inner_RS[:, -1] = False
    if not inner_RS.any():
        return actions_RS
    drawn_K = actions_RS[inner_RS].unique()
    place_RS = torch.searchsorted(drawn_K, actions_RS.contiguous()).clamp(max=len(drawn_K) - 1)
    there_RS = drawn_K[place_RS] == actions_RS
    return drawn_K[(place_RS + there_RS.long()) % len(drawn_K)]
