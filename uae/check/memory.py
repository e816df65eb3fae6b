"""The memory plan of a run against the weights that were really loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uae.check.parts.verdicts import Found, at_most, not_applicable
from uae.check.parts.weights import size_of
from uae.memory import plan
from uae.module import UnifiedGRPO
from uae.types import PlannedSystem

SHARE = 0.03  # of the bytes: learned queries, and buffers in a data type of their own, are left out


def weights_as_planned(module: UnifiedGRPO, data: Any, trainer: Mapping[str, Any]) -> Found:
    """Bytes of all weights by the plan and in memory, as a share of the latter.

    Args:
        module: The module, built.
        data: The data module of the run.
        trainer: The settings of ``trainer`` in the configuration.
    """
    if not isinstance(module.system, PlannedSystem):
        return not_applicable(f"{type(module.system).__name__} has no blueprint")
    if module.plan.train != "captions" and module.system.blueprint().drawing is None:
        return not_applicable("the plan leaves out what the renderer's own training takes")
    rows = plan(module, data, trainer).rows
    planned = sum(row.whole for row in rows if row.parameters or row.name == "reference copy")
    there = size_of(module.umm, module.reward, module.unified_score)
    return at_most(abs(planned - there) / there, SHARE, f"{planned / 1e6:.1f} MB by the plan, {there / 1e6:.1f} MB in memory")
