"""Other engines, a module each: run `python -m benchmarks.peers.<name> CHECKPOINT FORMAT TOKENS_OUT [WORKLOAD ...]` in its environment."""
