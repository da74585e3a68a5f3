"""One file for each peer: `python -m benchmarks.peers.<name> CHECKPOINT FORMAT TOKENS_OUT [CELL ...]` in that peer's environment."""
