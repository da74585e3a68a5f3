"""Records which blocks are in a replica's prefix cache, as a snapshot and changes for the fronts' indexes."""

import threading

from cluster.messages import BlockUpdate
from engine.kv.keys import BlockKey

SHORT_KEY_BYTES = 8
"""Length to which content keys are shortened. A collision can only make a router choose a worse replica."""


class BlockJournal:
    """The `engine.kv.block_pool.BlockListener` of all shards of one replica. The engine's thread writes, the intake's thread reads.

    A block that several shards hold is reported once. One that came and went between two readings is reported as evicted.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders: dict[bytes, int] = {}
        self._changed: dict[bytes, bool] = {}
        """Keys changed since the last reading, and whether they are cached now."""
        self._number = 0

    def stored(self, key: BlockKey) -> None:
        short = key[:SHORT_KEY_BYTES]
        with self._lock:
            holders = self._holders.get(short, 0)
            self._holders[short] = holders + 1
            if not holders:
                self._changed[short] = True

    def evicted(self, key: BlockKey) -> None:
        short = key[:SHORT_KEY_BYTES]
        with self._lock:
            holders = self._holders.get(short, 0)
            if holders > 1:
                self._holders[short] = holders - 1
            elif holders:
                del self._holders[short]
                self._changed[short] = False

    def changes(self) -> BlockUpdate | None:
        """The changes since the last reading, for every front that has a snapshot; None if there are none."""
        with self._lock:
            if not self._changed:
                return None
            changed, self._changed = self._changed, {}
        self._number += 1
        stored = b"".join(key for key, there in changed.items() if there)
        evicted = b"".join(key for key, there in changed.items() if not there)
        return BlockUpdate(self._number, whole=False, stored=stored, evicted=evicted)

    def snapshot(self) -> BlockUpdate:
        """All blocks, including changes that were not read yet; applying those again does no harm."""
        with self._lock:
            return BlockUpdate(self._number, whole=True, stored=b"".join(self._holders), evicted=b"")
