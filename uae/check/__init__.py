"""Checks of any system behind the protocols of `uae.types`: ``python -m uae.check SYSTEM.yaml``. See docs/checking.md."""

from uae.check.parts.verdicts import Found
from uae.check.system import check

__all__ = ["Found", "check"]
