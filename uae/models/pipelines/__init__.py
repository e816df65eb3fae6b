"""Diffusers pipelines: how they are loaded, called, masked and stepped."""
