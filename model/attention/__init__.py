"""Attention over paged KV: a protocol, an oracle, and fast backends, one file each."""
