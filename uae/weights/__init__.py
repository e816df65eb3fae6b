"""Weights in the formats of the libraries: names, layouts, dtypes, devices, code that lies beside them."""
