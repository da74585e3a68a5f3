"""What a turn of the engine hands out: events, and the tokens of decoding sequences as columns."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.plan import TokenEvent
from engine.sequence import Sequence

NO_TAG = -1
"""`Request.tag` of a request that was submitted without one."""


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """One more token for each of many requests, none of which ended by it."""

    tags: np.ndarray
    """int64 (S): `Request.tag`"""
    offsets: np.ndarray
    """int64 (S): output positions"""
    tokens: np.ndarray
    """int64 (S)"""
    sequences: list[Sequence]

    def __len__(self) -> int:
        return len(self.sequences)

    def events(self, rows: Iterable[int] | None = None) -> Iterator[TokenEvent]:
        """The same as events, for all rows or for some."""
        for row in range(len(self)) if rows is None else rows:
            yield self.sequences[row].token_event(int(self.offsets[row]), int(self.tokens[row]))


@dataclass(eq=False)
class EngineOutput:
    """Iterates over all as events; consumers with many streams read `token_batches` directly. A request is in a step at most once."""

    events: list[TokenEvent] = field(default_factory=list)
    token_batches: list[TokenBatch] = field(default_factory=list)

    def add(self, more: "EngineOutput") -> None:
        self.events += more.events
        self.token_batches += more.token_batches

    def __iter__(self) -> Iterator[TokenEvent]:
        yield from self.events
        for batch in self.token_batches:
            yield from batch.events()

    def __len__(self) -> int:
        return len(self.events) + sum(map(len, self.token_batches))

    def __eq__(self, other: Any) -> bool:
        return list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]
