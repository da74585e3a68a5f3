"""Samples tokens from logits, each row with its own parameters. Place 11 of a request."""
