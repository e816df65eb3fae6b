"""Diffusion renderers that learn: denoising steps as actions."""
