"""What a replica's prefix cache holds, told to the fronts: the whole once, then what has changed."""

import threading

from cluster.messages import BlockUpdate
from engine.kv.keys import BlockKey

SHORT_KEY_BYTES = 8
"""Bytes of a content key that are told. Two blocks that agree in them would cost a router a poor choice, and nothing else."""


class BlockJournal:
    """An `engine.kv.block_pool.BlockListener` of all shards of one replica: told by the engine's thread, read by the intake's.

    A block that several shards hold is told once. What came and went between two readings is told as gone, which it is.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders: dict[bytes, int] = {}
        self._changed: dict[bytes, bool] = {}
        """Since the last reading: whether it is there now."""
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
        """What has changed since the last reading; to be told to everyone who has the whole."""
        with self._lock:
            if not self._changed:
                return None
            changed, self._changed = self._changed, {}
        self._number += 1
        stored = b"".join(key for key, there in changed.items() if there)
        evicted = b"".join(key for key, there in changed.items() if not there)
        return BlockUpdate(self._number, whole=False, stored=stored, evicted=evicted)

    def snapshot(self) -> BlockUpdate:
        """All that is there, news that were not read yet included: telling those again does no harm."""
        with self._lock:
            return BlockUpdate(self._number, whole=True, stored=b"".join(self._holders), evicted=b"")
