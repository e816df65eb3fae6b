"""Tiny random text-to-image pipelines of the classes of diffusers, in its layout."""
