"""Place 4 of a request: a front's index of the blocks in a replica's prefix cache: those it reported, and those that will be there soon."""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from cluster.block_journal import SHORT_KEY_BYTES
from cluster.messages import BlockUpdate
from engine.kv.keys import block_key, root_key
from engine.request import Request

MAX_KEYS = 1024
"""Of a longer prompt only the first blocks are looked up."""
EXPECT_S = 2.0
"""How long a block of a request that was sent to a replica counts as cached there, until the replica reports it."""
MAX_EXPECTED = 16_384


def prompt_keys(request: Request, block_tokens: int) -> list[bytes]:
    """Shortened content keys of the blocks of a prompt that can come from the prefix cache: all full blocks before the last token."""
    tokens = request.prompt + request.committed
    parent, keys = root_key(request.salt), []
    for index in range(min((len(tokens) - 1) // block_tokens, MAX_KEYS)):
        parent = block_key(parent, tokens[index * block_tokens : (index + 1) * block_tokens])
        keys.append(parent[:SHORT_KEY_BYTES])
    return keys


class PrefixIndex:
    """The blocks of one replica's prefix cache, by content key. Usable from a snapshot on, until a message with changes is missing."""

    def __init__(self, *, max_blocks: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_blocks, self._clock = max_blocks, clock
        self._blocks: set[bytes] = set()
        self._expected: OrderedDict[bytes, float] = OrderedDict()
        """Key -> until when it counts; the oldest first."""
        self._number: int | None = None
        self.too_large = False
        """The replica has more blocks than ``max_blocks``, so none are indexed."""

    @property
    def usable(self) -> bool:
        return self._number is not None

    @property
    def needs_snapshot(self) -> bool:
        """Whether the replica should be asked for a snapshot."""
        return self._number is None and not self.too_large

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def apply(self, blocks: BlockUpdate) -> None:
        """Apply a snapshot or changes. A gap in the numbers makes the index unusable until the next snapshot."""
        if self.too_large:
            return
        if blocks.whole:
            self._blocks = set(_split(blocks.stored))
        elif self._number is None or blocks.number != self._number + 1:
            return self.clear()
        else:
            self._blocks.update(_split(blocks.stored))
            self._blocks.difference_update(_split(blocks.evicted))
        self._number = blocks.number
        if len(self._blocks) > self._max_blocks:
            self.clear()
            self.too_large = True

    def clear(self) -> None:
        self._blocks.clear()
        self._expected.clear()
        self._number = None

    def expect(self, keys: Sequence[bytes]) -> None:
        """A request whose prompt has these keys was sent to the replica."""
        until = self._clock() + EXPECT_S
        for key in keys:
            if key not in self._blocks:
                self._expected[key] = until
                self._expected.move_to_end(key)
        while len(self._expected) > MAX_EXPECTED:
            self._expected.popitem(last=False)

    def overlap(self, keys: Sequence[bytes]) -> int:
        """How many leading ``keys`` are cached there or expected to be soon; 0 if the index is not usable."""
        if not self.usable:
            return 0
        now = self._clock()
        while self._expected and next(iter(self._expected.values())) <= now:
            self._expected.popitem(last=False)
        for index, key in enumerate(keys):
            if key not in self._blocks and key not in self._expected:
                return index
        return len(keys)


def _split(raw: bytes) -> list[bytes]:
    return [raw[start : start + SHORT_KEY_BYTES] for start in range(0, len(raw), SHORT_KEY_BYTES)]
