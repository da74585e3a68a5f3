"""Plan the parallel layouts of a model on given GPUs: what fits, and how fast it could be. Pure arithmetic: no torch, no GPU."""
