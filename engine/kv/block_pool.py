"""A fixed number of KV blocks: who uses them, what they still hold, and which are given away next."""

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from engine.kv.keys import BlockKey


class BlockListener(Protocol):
    """Told what the prefix cache holds; a router can follow it. Of several shards each tells: what two hold is stored twice."""

    def stored(self, key: BlockKey) -> None: ...
    def evicted(self, key: BlockKey) -> None: ...


class BlockPool:
    """Every block is in exactly one state: used (an owner counts on it), cached (no owner, but its content has a key) or free.

    Cached blocks are evicted least recently released first, and only when no free block is left.
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
        """Blocks for one owner, their old content forgotten. The caller has looked at `num_available`."""
        assert count <= self.num_available, f"asked for {count} blocks of {self}"
        blocks = []
        for _ in range(count):
            block = self._free.popleft() if self._free else self._evict()
            self._owners[block] = 1
            blocks.append(block)
        return blocks

    def find(self, keys: Iterable[BlockKey]) -> list[int]:
        """The blocks that hold the longest run of `keys` from the first one; none of them changes state."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_cached_of(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` have no owner: sharing those takes them from what is available."""
        return sum(block in self._cached for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """One more owner for each of the blocks, which `find` gave."""
        for block in blocks:
            self._cached.pop(block, None)
            self._owners[block] += 1

    def publish(self, block: int, key: BlockKey) -> None:
        """A used block is full and computed: it may be found by its key. An equal block that was there first stays the one found."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key
            if self._listener is not None:
                self._listener.stored(key)

    def release(self, blocks: Sequence[int]) -> None:
        """One owner less for each. The last blocks of a sequence are evicted before its first, which others share more likely."""
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
        """The content of these blocks is not to be found any more; whoever owns them keeps them."""
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
        """The content of every block is lost, and all owners with it."""
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
