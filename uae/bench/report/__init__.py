"""Several results in one table, beside the paper's."""
