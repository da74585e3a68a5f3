"""What fronts tell each other: a board that hangs in the directory, where each pins one note that vanishes unless it is renewed."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Generic, TypeVar

from cluster.directory import DirectoryClient, DirectoryUnavailable

Note = TypeVar("Note")


class PeerNotes(Generic[Note]):
    """One front's hand on the board ``name`` of ``app``. Notes travel by pickle, between processes of one Ray cluster."""

    def __init__(self, app: str, name: str, own_id: str) -> None:
        self._directory, self._name, self._id = DirectoryClient(app), name, own_id
        self._others: tuple[Note, ...] = ()
        self._num_others = 0
        self._pinning: asyncio.Task[None] | None = None

    @property
    def num_peers(self) -> int:
        """How many others there were when the own note was last pinned."""
        return self._num_others

    def publish_every(self, note: Callable[[], Note], *, every_s: float) -> None:
        """Pin what ``note`` gives, again and again, until `close`. To be called in a running event loop."""
        self._pinning = asyncio.create_task(self._publish_forever(note, every_s), name=f"pin-{self._name}")

    async def peers(self) -> tuple[Note, ...]:
        """What the others have pinned; what they had pinned before, where the directory does not answer in time."""
        with contextlib.suppress(DirectoryUnavailable):
            notes = await self._directory.ask("pinned", self._name)
            self._others = tuple(note for key, note in notes.items() if key != self._id)
        return self._others

    async def close(self) -> None:
        if self._pinning is not None:
            self._pinning.cancel()
            await asyncio.gather(self._pinning, return_exceptions=True)

    async def _publish_forever(self, note: Callable[[], Note], every_s: float) -> None:
        while True:
            with contextlib.suppress(DirectoryUnavailable):
                self._num_others = await self._directory.ask("pin", self._name, self._id, note()) - 1
            await asyncio.sleep(every_s)
