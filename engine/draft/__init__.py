"""Guessing what a sequence says next, so that one step can compute several of its tokens."""
