"""The control plane: decides which tokens are computed when. Free of torch except for `engine.run`."""
