"""Content keys of blocks: within one salt, equal keys mean equal tokens from the very first token on."""

import hashlib
from array import array
from collections.abc import Sequence

BlockKey = bytes


def root_key(salt: str) -> BlockKey:
    """The parent key of a sequence's first block. Requests with different salts share no blocks."""
    return hashlib.sha256(b"manta/1\0" + salt.encode()).digest()


def block_key(parent: BlockKey, tokens: Sequence[int]) -> BlockKey:
    """SHA-256 over the parent's key and the block's tokens as 64-bit integers."""
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()
