"""Step 11 of a request: logits to tokens, each row by its own parameters."""
