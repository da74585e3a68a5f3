"""Check every kernel against float64, one file per kind of kernel: see `checks.py`, and `registry.py` for their names."""
