"""Which actions of a rollout the loss leaves out, and which groups are drawn again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Filtering:
    """What becomes of groups and captions that teach nothing, or the wrong thing. The default keeps everything.

    What is left out, is left out of the loss (its KL term and its entropy bonus included) and of what the loss divides by. It stays in
    the group that rewards are compared in, and in all logs.

    Args:
        rounds: How many times a group without advantages (all rewards equal, or none scored) is drawn again, with other random
            numbers, before it stays as it is (dynamic sampling of DAPO, arXiv 2503.14476, section 3.2). 0 never draws again. Every
            round takes the time of a rollout of these groups; all ranks take as many rounds as the one that needs most.
        drop_flat_groups: Whether groups that have no advantages in the end are left out. Their policy terms are 0 anyway.
        drop_truncated: Whether captions that reach sampling.max_tokens are left out (overlong filtering of DAPO, section 3.4): what
            they would have said is not known. Their reconstructions still train a renderer.
    """

    rounds: int = 0
    drop_flat_groups: bool = False
    drop_truncated: bool = False

    def __post_init__(self) -> None:
        """Refuse a negative number."""
        if self.rounds < 0:
            raise ValueError(f"model.init_args.filtering.rounds={self.rounds}; allowed: 0 (groups are drawn once) or more")

    @property
    def drops(self) -> bool:
        """Whether some rows may be left out."""
        return self.drop_flat_groups or self.drop_truncated


def in_varied_groups(advantage_R: Tensor, group: int) -> Tensor:
    """Whether a row's group has an advantage other than 0; bool ``[R]``. Groups are ``group`` rows in a row."""
    return (advantage_R.view(-1, group) != 0).any(1).repeat_interleave(group)


def on_any_rank(found: bool, device: torch.device) -> bool:
    """Whether something was found on at least one rank. All ranks have to ask."""
    if not distributed.is_initialized():
        return found
    flag = torch.tensor(float(found), device=device)
    distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
    return bool(flag)
