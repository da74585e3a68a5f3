"""Which layouts a model can have on given GPUs, what each holds and how fast it could be. Pure arithmetic: no torch, no GPU."""
