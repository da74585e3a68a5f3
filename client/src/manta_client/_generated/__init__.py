"""Stubs of manta.v1, written by `client/generate.py`."""
