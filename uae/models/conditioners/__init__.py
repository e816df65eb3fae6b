"""Text to what a renderer is conditioned on."""
