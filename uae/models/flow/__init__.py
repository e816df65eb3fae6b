"""Flow-matching renderers that are trained by reinforcement learning, with denoising steps as actions."""
