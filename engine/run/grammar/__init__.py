"""Structured output: constrains the tokens that may be sampled, on the rank that samples."""
