"""Unified-Bench protocol 1: similarity of sources and reconstructions."""
