"""Equal prefixes are computed once: which blocks of a sequence are cached, and which are being computed by another sequence."""

from engine.kv.block_pool import BlockPool
from engine.kv.keys import BlockKey
from engine.sequence import Sequence


class PrefixCache:
    """Finds and publishes full blocks by content. When disabled it finds nothing and publishes nothing."""

    def __init__(self, pool: BlockPool, block_tokens: int, *, enabled: bool) -> None:
        self._pool, self._block_tokens, self._enabled = pool, block_tokens, enabled
        self._computing: dict[BlockKey, int] = {}
        """Blocks that a running sequence (by number) will publish."""
        self.num_queried = self.num_hits = 0
        """Tokens looked up at admission, and how many of them were found."""

    def find(self, sequence: Sequence) -> list[int]:
        """Blocks of the longest cached prefix, excluding tokens that must be computed for their logits."""
        if not self._enabled:
            return []
        shareable = sequence.num_skippable // self._block_tokens
        return self._pool.find(sequence.keys(shareable, self._block_tokens))

    def is_being_computed(self, sequence: Sequence, num_found: int) -> bool:
        """Whether a running sequence is computing the block behind the first `num_found` ones: waiting for it is then cheaper."""
        shareable = sequence.num_skippable // self._block_tokens
        if not self._enabled or num_found >= shareable:
            return False
        return sequence.key(num_found, self._block_tokens) in self._computing

    def begin(self, sequence: Sequence, num_found: int) -> None:
        """The sequence was opened with its first `num_found` blocks from the cache, and will compute its other full blocks."""
        if not self._enabled or sequence.is_unsplittable:
            return
        assert sequence.number is not None
        self.num_queried += len(sequence.tokens)
        self.num_hits += num_found * self._block_tokens
        for key in sequence.keys(len(sequence.tokens) // self._block_tokens, self._block_tokens)[num_found:]:
            self._computing.setdefault(key, sequence.number)

    def publish(self, sequence: Sequence, since: int) -> None:
        """Tokens [since, num_computed) have been computed: share the blocks that became full."""
        if not self._enabled or sequence.is_unsplittable:
            return
        first, last = since // self._block_tokens, sequence.num_computed // self._block_tokens
        for index in range(first, last):
            key = sequence.key(index, self._block_tokens)
            self._pool.publish(sequence.blocks[index], key)
            self._computing.pop(key, None)

    def disown(self, sequence: Sequence) -> None:
        """The KV of the sequence cannot be trusted (NaN logits, for instance): no other sequence may find its blocks."""
        self._pool.forget(sequence.blocks)

    def abandon(self, sequence: Sequence) -> None:
        """The sequence is closed and will not publish the blocks it has not computed."""
        if self._computing:
            keys = sequence.keys(min(len(sequence.blocks), len(sequence.tokens) // self._block_tokens), self._block_tokens)
            for key in keys:
                if self._computing.get(key) == sequence.number:
                    del self._computing[key]
