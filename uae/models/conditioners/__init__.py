"""Conditioners: they turn captions into the condition from which a renderer draws."""
