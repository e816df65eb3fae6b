"""What is wrong with a machine, or with a run, and what to change: ``python -m uae.doctor [RUN_FOLDER]``."""

from uae.doctor.finding import Finding, note, ok, wrong

__all__ = ["Finding", "note", "ok", "wrong"]
