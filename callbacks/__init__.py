"""Lightning callbacks. Each works with any strategy, writes on the first rank only and does nothing without a logger."""
