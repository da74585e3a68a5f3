"""Step 6 of a request: where any thread leaves what it wants of the engine, and the engine's own thread takes it in."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import NamedTuple

from engine.errors import EngineStopped, QueueFull
from engine.policy import Policy, Waits
from engine.request import Request
from engine.scheduler import Key


class Inbox:
    """Looks at the queue as it was shown, never into the scheduler."""

    def __init__(self, *, max_waiting: int, policy: Policy) -> None:
        self._limit, self._policy = max_waiting, policy
        self._left: SimpleQueue[Request | Key] = SimpleQueue()
        self._lock = threading.Lock()
        self._knocked, self._closed = threading.Event(), threading.Event()
        self.num_submitted = 0
        """Requests that were let in, ever."""
        self._queue: list[Waits] = []
        """Who waits, as it was last shown, and who has come since."""
        self._unread: list[Waits] = []
        """Those of them that the engine's thread has not taken."""

    # --- from any thread

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    def submit(self, request: Request) -> None:
        """Leave a request.

        Raises:
            EngineStopped: it is closed.
            QueueFull: nobody like this may wait now.
        """
        with self.held_open():
            if len(self._queue) >= self._limit and not request.attempt and not self._policy.may_wait(request, self._queue, self._limit):
                raise QueueFull(limit=self._limit)
            self.num_submitted += 1
            self._left.put(request)
            arrival = Arrival(request)
            self._queue.append(arrival)
            self._unread.append(arrival)

    def cancel(self, key: Key) -> None:
        """Whether it is open or closed."""
        self._left.put(key)
        self._knocked.set()

    @contextlib.contextmanager
    def held_open(self) -> Iterator[None]:
        """What is done meanwhile, the engine's thread sees before it sees the door closed; it is woken afterwards.

        Raises:
            EngineStopped: it is closed.
        """
        with self._lock:
            if self.is_closed:
                raise EngineStopped("this engine has stopped")
            yield
        self._knocked.set()

    def close(self) -> None:
        """Let nobody in any more."""
        with self._lock:
            self._closed.set()
        self._knocked.set()

    # --- the engine's thread

    def is_empty(self) -> bool:
        """Whether there is nothing to take."""
        return self._left.empty()

    def take(self) -> list[Request | Key]:
        """What was left: requests, and keys of those that are cancelled, in order."""
        taken: list[Request | Key] = []
        if self.is_empty():
            return taken
        with self._lock:
            self._unread = []
            with contextlib.suppress(Empty):
                while True:
                    taken.append(self._left.get_nowait())
        return taken

    def show(self, queue: Sequence[Waits]) -> None:
        """Who waits now, of those that were taken."""
        if not (self._queue or queue):
            return  # as it was; whoever comes now puts himself in
        with self._lock:
            self._queue = [*queue, *self._unread]

    def wait(self) -> None:
        """Until something is left, or it is closed."""
        self._knocked.wait()
        self._knocked.clear()


class Arrival(NamedTuple):
    """What the door knows of a request that has come since."""

    request: Request
