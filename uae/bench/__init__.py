"""Benchmarks of captions, reconstructions and generated images, of any system: ``python -m uae.bench``.

Every benchmark is two steps, so that they can run on different machines: a system writes a folder, and a folder is scored.
"""
