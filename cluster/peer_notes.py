"""Notes that the fronts of an application exchange through a topic in the directory. A front's note expires unless it is renewed."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Generic, TypeVar

from cluster.directory import DirectoryClient, DirectoryUnavailable

Note = TypeVar("Note")


class PeerNotes(Generic[Note]):
    """One front's access to the topic ``name`` of ``app``: publishes its own note, reads those of its peers. Notes are pickled."""

    def __init__(self, app: str, name: str, own_id: str, *, directory: DirectoryClient | None = None) -> None:
        self._directory, self._name, self._id = directory or DirectoryClient(app), name, own_id
        self._last_peers: tuple[Note, ...] = ()
        self._num_peers = 0
        self._publishing: asyncio.Task[None] | None = None

    @property
    def num_peers(self) -> int:
        """How many peers had a note when the own one was last published."""
        return self._num_peers

    def keep_publishing(self, note: Callable[[], Note | None], *, every_s: float) -> None:
        """Publish what ``note`` returns every ``every_s`` seconds until `close`. Call it in a running event loop.

        While it returns None nothing is published: the last note expires, and `num_peers` stays what it was.
        """
        self._publishing = asyncio.create_task(self._publish_forever(note, every_s), name=f"pin-{self._name}")

    async def peers(self) -> tuple[Note, ...]:
        """The notes of the peers; the last ones known, if the directory does not answer in time."""
        with contextlib.suppress(DirectoryUnavailable):
            notes = await self._directory.ask("pinned", self._name)
            self._last_peers = tuple(note for key, note in notes.items() if key != self._id)
        return self._last_peers

    async def close(self) -> None:
        if self._publishing is not None:
            self._publishing.cancel()
            await asyncio.gather(self._publishing, return_exceptions=True)

    async def _publish_forever(self, note: Callable[[], Note | None], every_s: float) -> None:
        while True:
            if (current := note()) is not None:
                with contextlib.suppress(DirectoryUnavailable):
                    self._num_peers = await self._directory.ask("pin", self._name, self._id, current) - 1
            await asyncio.sleep(every_s)
