"""Manta beside its peers, each through its own public door: `make bench`, `make bench-peers`."""
