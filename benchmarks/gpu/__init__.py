"""Correctness checks and benchmarks of the engine on a GPU, in one call: see README.md here, and `python -m benchmarks.gpu --help`."""
