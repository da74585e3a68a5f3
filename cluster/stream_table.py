"""Place 5 of a request: to which front and which of its streams a token belongs, looked up for all tokens of a step at once.

A front numbers its streams (`Request.tag`); the replica gives each stream a tag of its own towards the engine. That tag is a slot in this
table and a serial number, so a token that comes after its stream was removed matches no stream, even if the slot was reused.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engine.output import NO_TAG, TokenBatch

Front = bytes
SLOT_BITS = 32


@dataclass(frozen=True)
class FrontTokens:
    """Tokens of one step for one front, in columns of int64."""

    streams: bytes
    offsets: bytes
    tokens: bytes


class StreamTable:
    """Maps the engine's tags to fronts and their stream numbers."""

    def __init__(self) -> None:
        self._tags = np.full(16, NO_TAG, np.int64)
        self._fronts = np.zeros(16, np.int64)
        self._streams = np.zeros(16, np.int64)
        self._free = list(range(16))
        self._num_taken = 0
        self._front_at: list[Front] = []
        self._number_of: dict[Front, int] = {}
        self._unused: list[int] = []
        """Indices in `_front_at` of fronts that were removed."""

    def add(self, front: Front, stream: int) -> int:
        """Add a stream of a front and return its tag; `NO_TAG` if the front gave it no number."""
        if stream == NO_TAG:
            return NO_TAG
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._num_taken += 1
        self._tags[slot] = tag = (self._num_taken << SLOT_BITS) + slot
        self._fronts[slot], self._streams[slot] = self._number(front), stream
        return tag

    def remove(self, tag: int) -> None:
        """Remove a stream. Its later tokens are ignored."""
        slot = tag & ((1 << SLOT_BITS) - 1)
        if tag != NO_TAG and self._tags[slot] == tag:
            self._tags[slot] = NO_TAG
            self._free.append(slot)

    def remove_front(self, front: Front) -> None:
        """Remove a front whose streams have all been removed."""
        if (number := self._number_of.pop(front, None)) is not None:
            self._front_at[number] = b""
            self._unused.append(number)

    def by_front(self, batch: TokenBatch) -> Iterator[tuple[Front, FrontTokens]]:
        """The tokens of a step for each front."""
        slots = batch.tags & ((1 << SLOT_BITS) - 1)
        known = batch.tags != NO_TAG
        slots[~known] = 0
        known &= self._tags[slots] == batch.tags
        columns = (self._streams[slots], batch.offsets, batch.tokens)
        fronts = self._fronts[slots]
        if known.all() and (fronts == fronts[0]).all():  # the usual case: one front
            yield self._front_at[int(fronts[0])], FrontTokens(*(column.tobytes() for column in columns))
            return
        for number in np.unique(fronts[known]).tolist():
            rows = known & (fronts == number)
            yield self._front_at[number], FrontTokens(*(column[rows].tobytes() for column in columns))

    def _number(self, front: Front) -> int:
        if front not in self._number_of:
            if not self._unused:
                self._unused.append(len(self._front_at))
                self._front_at.append(front)
            self._number_of[front] = number = self._unused.pop()
            self._front_at[number] = front
        return self._number_of[front]

    def _grow(self) -> None:
        size = len(self._tags)
        self._free = list(range(size, 2 * size))
        self._tags = np.concatenate([self._tags, np.full(size, NO_TAG, np.int64)])
        self._fronts = np.concatenate([self._fronts, np.zeros(size, np.int64)])
        self._streams = np.concatenate([self._streams, np.zeros(size, np.int64)])


def untagged_rows(batch: TokenBatch) -> Sequence[int]:
    """Rows of streams that have no tag."""
    return np.flatnonzero(batch.tags == NO_TAG).tolist()
