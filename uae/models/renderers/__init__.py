"""Condition to image."""
