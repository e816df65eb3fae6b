"""Captioners: models that write a text about an image."""
