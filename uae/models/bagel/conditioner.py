"""Captions as the prompts after which BAGEL draws."""

from __future__ import annotations

from typing import Any

import torch

from uae.models.bagel.prompts import PromptCondition
from uae.models.conditioners.prompts import prompt_ids
from uae.types import Rollout


class BagelConditioner:
    """Turns captions into prompts; implements `uae.types.Conditioner`. It reads with no network.

    Args:
        tokenizer: BAGEL's tokenizer.
        max_tokens: Largest number of tokens of a prompt, both marks included. A longer caption is cut, with a warning, and
            counted in ``truncated``.
    """

    def __init__(self, tokenizer: Any, max_tokens: int = 1024) -> None:
        self.tokenizer, self.max_tokens, self.truncated = tokenizer, max_tokens, 0

    def encode(self, texts: list[str], rollout: Rollout[Any] | None = None) -> PromptCondition:
        """N captions as N prompts: ``<|im_start|>``, the caption, ``<|im_end|>``."""
        rows, cut = prompt_ids(self.tokenizer, "<|im_start|>{caption}<|im_end|>", texts, self.max_tokens)
        self.truncated += cut
        longest = max(map(len, rows))
        ids_NL = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask_NL = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return PromptCondition(ids_NL, mask_NL)

    def to(self, device: Any) -> BagelConditioner:
        """Return self; there are no weights to move."""
        return self
