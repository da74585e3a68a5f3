"""Every kernel against float64, one file for each kind of them: see `checks.py`, and `registry.py` for their names."""
