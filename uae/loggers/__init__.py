"""Loggers that write to the folder of a run, and pictures and tables in whatever logger a run has."""

from uae.loggers.following import CSV, FollowsRun, MLFlow, WeightsAndBiases

__all__ = ["CSV", "FollowsRun", "MLFlow", "WeightsAndBiases"]
