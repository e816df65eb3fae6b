"""BAGEL (arXiv 2505.14683) as plain torch modules with the names of the released weights."""
