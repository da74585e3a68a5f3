"""Step 5 of a request: which front's which stream a token is for, looked up for a whole step at once.

A front names its streams by numbers (`Request.tag`), and so does the desk towards the engine. A number of the desk is a place in
its table and how often that place was taken before, so that what comes late is for nobody and never for another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engine.output import NO_TAG, TokenBatch

Front = bytes
PLACE_BITS = 32


@dataclass(frozen=True)
class FrontTokens:
    """Tokens of one step for one front, in columns of int64."""

    streams: bytes
    offsets: bytes
    tokens: bytes


class StreamTable:
    """The choices that fronts wait for, by the desk's numbers."""

    def __init__(self) -> None:
        self._tags = np.full(16, NO_TAG, np.int64)
        self._fronts = np.zeros(16, np.int64)
        self._streams = np.zeros(16, np.int64)
        self._free = list(range(16))
        self._num_taken = 0
        self._front_at: list[Front] = []
        self._number_of: dict[Front, int] = {}
        self._unused: list[int] = []
        """Numbers of fronts that are gone."""

    def enter(self, front: Front, stream: int) -> int:
        """A number for a stream of a front; `NO_TAG` for one that has none with its front."""
        if stream == NO_TAG:
            return NO_TAG
        if not self._free:
            self._grow()
        place = self._free.pop()
        self._num_taken += 1
        self._tags[place] = tag = (self._num_taken << PLACE_BITS) + place
        self._fronts[place], self._streams[place] = self._number(front), stream
        return tag

    def leave(self, tag: int) -> None:
        """Nobody waits for it any more."""
        place = tag & ((1 << PLACE_BITS) - 1)
        if tag != NO_TAG and self._tags[place] == tag:
            self._tags[place] = NO_TAG
            self._free.append(place)

    def forget(self, front: Front) -> None:
        """It is gone, and all of its streams have been left."""
        if (number := self._number_of.pop(front, None)) is not None:
            self._front_at[number] = b""
            self._unused.append(number)

    def sorted(self, batch: TokenBatch) -> Iterator[tuple[Front, FrontTokens]]:
        """What each front's streams have been told."""
        places = batch.tags & ((1 << PLACE_BITS) - 1)
        known = batch.tags != NO_TAG
        places[~known] = 0
        known &= self._tags[places] == batch.tags
        columns = (self._streams[places], batch.offsets, batch.tokens)
        fronts = self._fronts[places]
        if known.all() and (fronts == fronts[0]).all():  # mostly there is one front
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
    """Rows of requests whose front gave them no number."""
    return np.flatnonzero(batch.tags == NO_TAG).tolist()
