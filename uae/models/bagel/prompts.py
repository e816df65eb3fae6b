"""The prompts that BAGEL draws behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PromptCondition:
    """Prompts of N images.

    Args:
        ids_NL: Token ids, padded on the left. L is 0 for the empty prompt, which guidance leads away from.
        mask_NL: 1 for tokens, 0 for padding.
    """

    ids_NL: Tensor
    mask_NL: Tensor

    def __len__(self) -> int:
        """N, the number of rows."""
        return len(self.ids_NL)

    def index(self, rows: Sequence[int]) -> PromptCondition:
        """The condition of some of its rows."""
        at = list(rows)
        return PromptCondition(self.ids_NL[at], self.mask_NL[at])

    def cut(self) -> PromptCondition:
        """The same prompts without columns that are padding in all of them."""
        longest = int(self.mask_NL.sum(1).max())
        return PromptCondition(self.ids_NL[:, self.ids_NL.shape[1] - longest :], self.mask_NL[:, self.mask_NL.shape[1] - longest :])

    def without_text(self) -> PromptCondition:
        """As many prompts without any token."""
        return PromptCondition(self.ids_NL[:, :0], self.mask_NL[:, :0])
