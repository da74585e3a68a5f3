"""The KV blocks: their pool, and the prefix cache over it."""
