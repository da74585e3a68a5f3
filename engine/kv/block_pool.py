"""A fixed number of KV blocks: their owners, their cached content, and the order of eviction."""

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from engine.kv.keys import BlockKey


class BlockListener(Protocol):
    """Called when the content of the prefix cache changes, so that a router can track it. Shards call it independently: a key that
    two shards hold is stored twice."""

    def stored(self, key: BlockKey) -> None: ...
    def evicted(self, key: BlockKey) -> None: ...


class BlockPool:
    """Every block is in exactly one state: used (it has owners), cached (no owner, but its content can be found by key) or free.

    Cached blocks are evicted only when no block is free, the least recently released first.
    """

    def __init__(self, num_blocks: int, listener: BlockListener | None = None) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        self._listener = listener
        self._free = deque(range(num_blocks))
        self._owners = [0] * num_blocks
        self._key_of: dict[int, BlockKey] = {}
        self._block_of: dict[BlockKey, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free - self.num_cached

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could hand out."""
        return self.num_free + self.num_cached

    def allocate(self, count: int) -> list[int]:
        """Hand out blocks with one owner each; their old content is forgotten. The caller has checked `num_available`."""
        assert count <= self.num_available, f"asked for {count} blocks of {self}"
        blocks = []
        for _ in range(count):
            block = self._free.popleft() if self._free else self._evict()
            self._owners[block] = 1
            blocks.append(block)
        return blocks

    def find(self, keys: Iterable[BlockKey]) -> list[int]:
        """The blocks that hold the longest run of `keys`, beginning with the first key. Changes no state."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_cached_of(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` have no owner: sharing those makes `num_available` smaller."""
        return sum(block in self._cached for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Add an owner to each of the blocks, which `find` returned."""
        for block in blocks:
            self._cached.pop(block, None)
            self._owners[block] += 1

    def publish(self, block: int, key: BlockKey) -> None:
        """Let a used block that is full and computed be found by its key, unless an equal one was published before."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key
            if self._listener is not None:
                self._listener.stored(key)

    def release(self, blocks: Sequence[int]) -> None:
        """Remove an owner from each. The last blocks of a sequence are evicted before its first, which others are more likely to share."""
        for block in reversed(blocks):
            self._owners[block] -= 1
            assert self._owners[block] >= 0, f"block {block} was released twice"
            if self._owners[block]:
                continue
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def forget(self, blocks: Iterable[int]) -> None:
        """Let the content of these blocks not be found any more. Their owners keep them."""
        for block in blocks:
            key = self._key_of.pop(block, None)
            if key is None:
                continue
            del self._block_of[key]
            if block in self._cached:
                del self._cached[block]
                self._free.append(block)
            if self._listener is not None:
                self._listener.evicted(key)

    def clear(self) -> None:
        """Forget the content and the owners of all blocks."""
        for key in self._block_of:
            if self._listener is not None:
                self._listener.evicted(key)
        self._free = deque(range(self.num_blocks))
        self._owners = [0] * self.num_blocks
        self._key_of.clear()
        self._block_of.clear()
        self._cached.clear()

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        key = self._key_of.pop(block)
        del self._block_of[key]
        if self._listener is not None:
            self._listener.evicted(key)
        return block

    def __repr__(self) -> str:
        return f"<BlockPool [{self.num_used} used | {self.num_cached} cached | {self.num_free} free]>"
