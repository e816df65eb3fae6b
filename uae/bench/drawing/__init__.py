"""Captions drawn by an image model behind an API, as a folder that can be scored."""
