"""Every kernel against float64, one file for each kind of them: see `checks.py`, and `table.py` for their names."""
