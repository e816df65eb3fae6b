"""Several results in one table, beside the numbers of the paper."""
