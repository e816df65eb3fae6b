"""Captioners, conditioners, renderers and what of them trains."""
