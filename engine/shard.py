"""One data-parallel position of a replica as the scheduler sees it: its blocks, and the sequences that live in them."""

from collections.abc import Iterable
from dataclasses import dataclass

from engine.executor import Capacity
from engine.kv.block_pool import BlockListener, BlockPool
from engine.kv.prefix_cache import PrefixCache
from engine.sequence import Sequence

PREFIX_WORTH = 2
"""A sequence goes where its prefix is cached while that shard is busier than the least busy one by at most so many times the
tokens found: computing them again costs once, an uneven load in every step, for all shards wait for the slowest."""


class Shard:
    """A pool, the prefix cache over it, and its open sequences by their numbers. Shards share no block."""

    def __init__(self, index: int, capacity: Capacity, *, prefix_cache: bool, listener: BlockListener | None) -> None:
        self.index = index
        self.pool = BlockPool(capacity.num_blocks, listener)
        self.cache = PrefixCache(self.pool, capacity.block_tokens, enabled=prefix_cache)
        self.open: dict[int, Sequence] = {}

    def __repr__(self) -> str:
        return f"<Shard {self.index} [{len(self.open)} open] {self.pool}>"


@dataclass
class Portion:
    """A shard's part of a plan in the making."""

    shard: Shard
    budget: int
    """Tokens that it may still compute in this step."""
    max_decodes: int
    """Sequences with one token each that it may still take into this step."""
    load_tokens: int
    """Of its open sequences: about what a step costs there when all of them decode."""
    max_drafted: int = 0
    """Guessed tokens that it may still take into this step."""
    has_preempted: bool = False


@dataclass(frozen=True)
class Choice:
    """A shard that a waiting sequence could go to, and the blocks of its prefix that are there."""

    portion: Portion
    found: list[int]


def choices(sequence: Sequence, portions: Iterable[Portion], block_tokens: int) -> list[Choice]:
    """Best first: the longest cached prefix among the shards that are not too busy for it, then the least busy."""
    found = [Choice(portion, portion.shard.cache.find(sequence)) for portion in portions]
    least = min((choice.portion.load_tokens for choice in found), default=0)

    def rank(choice: Choice) -> tuple[bool, int, int]:
        worth = PREFIX_WORTH * len(choice.found) * block_tokens
        return choice.portion.load_tokens - least > worth, -len(choice.found), choice.portion.load_tokens

    return sorted(found, key=rank)
