"""The front's and the replica's code under a virtual clock, with everything that can happen between them."""
