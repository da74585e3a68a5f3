"""Samples tokens from logits, each row with its own parameters. Step 11 of a request."""
