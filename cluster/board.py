"""What fronts tell each other: a board that hangs in the directory, where each pins one note that vanishes unless it is renewed."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import ray

from cluster.directory import directory_actor

logger = logging.getLogger(__name__)

Note = TypeVar("Note")
READ_TIMEOUT_S = 1.0


class Board(Generic[Note]):
    """One front's hand on the board ``name`` of ``app``. Notes travel by pickle, between processes of one Ray cluster."""

    def __init__(self, app: str, name: str, own_id: str) -> None:
        self._app, self._name, self._id = app, name, own_id
        self._actor: Any = None
        self._others: tuple[Note, ...] = ()
        self._num_others = 0
        self._pinning: asyncio.Task[None] | None = None

    @property
    def num_others(self) -> int:
        """How many others there were when the own note was last pinned."""
        return self._num_others

    def keep_pinned(self, note: Callable[[], Note], *, every_s: float) -> None:
        """Pin what ``note`` gives, again and again, until `close`. To be called in a running event loop."""
        self._pinning = asyncio.create_task(self._pin_for_ever(note, every_s), name=f"pin-{self._name}")

    async def others(self) -> tuple[Note, ...]:
        """What the others have pinned; what they had pinned before, where the directory does not answer in time."""
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                notes = await self._directory().pinned.remote(self._name)
            self._others = tuple(note for key, note in notes.items() if key != self._id)
        except (ray.exceptions.RayError, ValueError, TimeoutError) as error:
            self._missed(error)
        return self._others

    async def close(self) -> None:
        if self._pinning is not None:
            self._pinning.cancel()
            await asyncio.gather(self._pinning, return_exceptions=True)

    async def _pin_for_ever(self, note: Callable[[], Note], every_s: float) -> None:
        while True:
            try:
                self._num_others = await self._directory().pin.remote(self._name, self._id, note()) - 1
            except (ray.exceptions.RayError, ValueError) as error:
                self._missed(error)
            await asyncio.sleep(every_s)

    def _directory(self) -> Any:
        if self._actor is None:
            self._actor = directory_actor(self._app)
        return self._actor

    def _missed(self, error: Exception) -> None:
        self._actor = None
        logger.warning("the board %s cannot be reached: %s", self._name, error)
