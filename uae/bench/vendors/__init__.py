"""Paid calls of models behind vendors' APIs: each once, within a cost limit, and without a word of the key in what is kept."""
