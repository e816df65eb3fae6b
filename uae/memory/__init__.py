"""The plan of a run's memory and communication, computed from layer sizes before any weight is loaded."""

from uae.memory.plan import plan
from uae.memory.table import Plan, Row

__all__ = ["Plan", "Row", "plan"]
