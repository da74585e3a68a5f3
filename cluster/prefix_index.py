"""Step 4 of a request: what of a prompt a replica has in its prefix cache, as the replica says and as a front may expect."""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from cluster.block_journal import SHORT_KEY_BYTES
from cluster.messages import BlockUpdate
from engine.kv.keys import block_key, root_key
from engine.request import Request

MAX_KEYS = 1024
"""Of a longer prompt only so many blocks are looked up."""
EXPECT_S = 2.0
"""For how long a block that a routed request is going to fill counts as being there, unless the replica says so itself."""
MAX_EXPECTED = 16_384


def prompt_keys(request: Request, block_tokens: int) -> list[bytes]:
    """Shortened content keys of the blocks that a replica may share with others: all full ones before the last token."""
    tokens = request.prompt + request.committed
    parent, keys = root_key(request.salt), []
    for index in range(min((len(tokens) - 1) // block_tokens, MAX_KEYS)):
        parent = block_key(parent, tokens[index * block_tokens : (index + 1) * block_tokens])
        keys.append(parent[:SHORT_KEY_BYTES])
    return keys


class PrefixIndex:
    """One replica's blocks, by content. It is of use between the message with the whole and one that does not follow on."""

    def __init__(self, *, max_blocks: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_blocks, self._clock = max_blocks, clock
        self._blocks: set[bytes] = set()
        self._expected: OrderedDict[bytes, float] = OrderedDict()
        """Key to when it no longer counts; the oldest first."""
        self._number: int | None = None
        self.too_large = False
        """The replica holds more than may be remembered here; nothing of it is."""

    @property
    def usable(self) -> bool:
        return self._number is not None

    @property
    def needs_snapshot(self) -> bool:
        """Whether the replica is to be asked for the whole."""
        return self._number is None and not self.too_large

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def take(self, blocks: BlockUpdate) -> None:
        """What the replica told. A gap in its numbers makes this index useless until the whole comes."""
        if self.too_large:
            return
        if blocks.whole:
            self._blocks = set(_split(blocks.stored))
        elif self._number is None or blocks.number != self._number + 1:
            return self.forget()
        else:
            self._blocks.update(_split(blocks.stored))
            self._blocks.difference_update(_split(blocks.evicted))
        self._number = blocks.number
        if len(self._blocks) > self._max_blocks:
            self.forget()
            self.too_large = True

    def forget(self) -> None:
        self._blocks.clear()
        self._expected.clear()
        self._number = None

    def expect(self, keys: Sequence[bytes]) -> None:
        """A request with this prompt was sent there."""
        until = self._clock() + EXPECT_S
        for key in keys:
            if key not in self._blocks:
                self._expected[key] = until
                self._expected.move_to_end(key)
        while len(self._expected) > MAX_EXPECTED:
            self._expected.popitem(last=False)

    def overlap(self, keys: Sequence[bytes]) -> int:
        """How many of the first ``keys`` are there, or are expected to be by the time a request comes; 0 where nothing is known."""
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
