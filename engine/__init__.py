"""Which tokens are computed when. Torch-free but for `engine.run`."""
