"""Attention over a paged KV cache: a protocol, a reference, and fast backends, one module each."""
