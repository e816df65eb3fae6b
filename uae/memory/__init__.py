"""Will it fit? The memory of a run, before anything is loaded."""

from uae.memory.plan import plan
from uae.memory.table import Plan, Row

__all__ = ["Plan", "Row", "plan"]
