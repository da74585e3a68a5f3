"""What the engine does on one GPU, in one call: see README.md here, and `python -m benchmarks.gpu --help`."""
