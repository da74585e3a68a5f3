"""Whose KV lies in which block: the pool, and the prefix cache over it."""
