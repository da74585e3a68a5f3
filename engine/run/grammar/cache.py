"""A cache of compiled grammars: least recently used first out, limited by bytes."""

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")

BASE_BYTES = 128 * 1024
BYTES_PER_CHARACTER = 256
"""Estimated size of a compiled grammar; tests compare it with how much a process really grows."""


def counted_bytes(source: str) -> int:
    """The estimated size of a compiled grammar with this source."""
    return BASE_BYTES + BYTES_PER_CHARACTER * len(source)


class GrammarCache(Generic[T]):
    """Compiled grammars by source. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: OrderedDict[str, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, source: str) -> T | None:
        with self._lock:
            if source in self._kept:
                self._kept.move_to_end(source)
            return self._kept.get(source)

    def put(self, source: str, grammar: T) -> None:
        with self._lock:
            if source in self._kept:
                return
            self._kept[source] = grammar
            self.num_bytes += counted_bytes(source)
            while self.num_bytes > self.max_bytes and self._kept:
                dropped, _ = self._kept.popitem(last=False)
                self.num_bytes -= counted_bytes(dropped)

    def __len__(self) -> int:
        return len(self._kept)

    def __repr__(self) -> str:
        return f"<GrammarCache [{len(self._kept)} kept | {self.num_bytes} of {self.max_bytes} bytes]>"
