"""Equal prefixes are computed once: which blocks of a sequence are there already, and which are on their way."""

from engine.kv.block_pool import BlockPool
from engine.kv.keys import BlockKey
from engine.sequence import Sequence


class PrefixCache:
    """Finds and publishes full blocks by content. Switched off it finds nothing and publishes nothing."""

    def __init__(self, pool: BlockPool, block_tokens: int, *, enabled: bool) -> None:
        self._pool, self._block_tokens, self._enabled = pool, block_tokens, enabled
        self._computing: dict[BlockKey, int] = {}
        """Blocks that a running sequence (by number) is about to publish."""
        self.num_queried = self.num_found = 0
        """Tokens looked up at admissions, and how many of them were found."""

    def find(self, sequence: Sequence) -> list[int]:
        """Blocks of the longest prefix that is cached, as far as it need not be computed for its logits."""
        if not self._enabled:
            return []
        shareable = sequence.num_skippable // self._block_tokens
        return self._pool.find(sequence.keys(shareable, self._block_tokens))

    def is_on_its_way(self, sequence: Sequence, num_found: int) -> bool:
        """Whether a running sequence is computing the block that comes after the `num_found` first ones: then waiting is cheaper."""
        shareable = sequence.num_skippable // self._block_tokens
        if not self._enabled or num_found >= shareable:
            return False
        return sequence.key(num_found, self._block_tokens) in self._computing

    def begin(self, sequence: Sequence, num_found: int) -> None:
        """The sequence was admitted with `num_found` blocks found, and will compute the other full ones."""
        if not self._enabled or sequence.is_whole:
            return
        assert sequence.number is not None
        self.num_queried += len(sequence.tokens)
        self.num_found += num_found * self._block_tokens
        for key in sequence.keys(len(sequence.tokens) // self._block_tokens, self._block_tokens)[num_found:]:
            self._computing.setdefault(key, sequence.number)

    def publish(self, sequence: Sequence, since: int) -> None:
        """Tokens [since, num_computed) have been computed: the blocks that are full now may be shared."""
        if not self._enabled or sequence.is_whole:
            return
        first, last = since // self._block_tokens, sequence.num_computed // self._block_tokens
        for index in range(first, last):
            key = sequence.key(index, self._block_tokens)
            self._pool.publish(sequence.blocks[index], key)
            self._computing.pop(key, None)

    def disown(self, sequence: Sequence) -> None:
        """What the sequence computed or shared is not to be trusted: nobody else shall find it."""
        self._pool.forget(sequence.blocks)

    def abandon(self, sequence: Sequence) -> None:
        """The sequence leaves; what it was about to publish will not come from it."""
        if self._computing:
            keys = sequence.keys(min(len(sequence.blocks), len(sequence.tokens) // self._block_tokens), self._block_tokens)
            for key in keys:
                if self._computing.get(key) == sequence.number:
                    del self._computing[key]
