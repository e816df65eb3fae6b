"""Benchmarks of captions, reconstructions and generated images."""
