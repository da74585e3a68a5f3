"""Place 6 of a request: where any thread leaves requests and cancellations, and the engine's thread picks them up."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import NamedTuple

from engine.errors import EngineStopped, QueueFull
from engine.policy import Policy, QueuedRequest
from engine.request import Request
from engine.scheduler import Key


class Submitted(NamedTuple):
    """A request that the scheduler has not seen yet, as a `QueuedRequest`."""

    request: Request


class Inbox:
    """Thread-safe. Decides whether the queue is full by the last snapshot of it (`set_waiting`) and never reads the scheduler."""

    def __init__(self, *, max_waiting: int, policy: Policy) -> None:
        self._max_waiting, self._policy = max_waiting, policy
        self._messages: SimpleQueue[Request | Key] = SimpleQueue()
        self._lock = threading.Lock()
        self._wake_up, self._closed = threading.Event(), threading.Event()
        self.num_submitted = 0
        """Requests accepted so far."""
        self._waiting: list[QueuedRequest] = []
        """The scheduler's queue as of the last `set_waiting`, and what was submitted since."""
        self._untaken: list[QueuedRequest] = []
        """Those of `_waiting` that the engine's thread has not taken yet."""

    # --- from any thread

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    def submit(self, request: Request) -> None:
        """Leave a request for the engine.

        Raises:
            EngineStopped: the inbox is closed.
            QueueFull: the queue accepts no such request now.
        """
        with self.while_open():
            is_full = len(self._waiting) >= self._max_waiting
            if is_full and not request.attempt and not self._policy.may_queue(request, self._waiting, self._max_waiting):
                raise QueueFull(limit=self._max_waiting)
            self.num_submitted += 1
            self._messages.put(request)
            submitted = Submitted(request)
            self._waiting.append(submitted)
            self._untaken.append(submitted)

    def cancel(self, key: Key) -> None:
        """Leave a cancellation; a closed inbox takes it too."""
        self._messages.put(key)
        self._wake_up.set()

    @contextlib.contextmanager
    def while_open(self) -> Iterator[None]:
        """Keep the inbox from being closed meanwhile, and wake the engine's thread afterwards.

        The engine's thread sees what was done inside before it sees the inbox closed.

        Raises:
            EngineStopped: the inbox is closed.
        """
        with self._lock:
            if self.is_closed:
                raise EngineStopped("this engine has stopped")
            yield
        self._wake_up.set()

    def close(self) -> None:
        """Accept no more requests."""
        with self._lock:
            self._closed.set()
        self._wake_up.set()

    # --- the engine's thread

    def is_empty(self) -> bool:
        """Whether there is nothing to take."""
        return self._messages.empty()

    def take(self) -> list[Request | Key]:
        """Everything that was left, in order: requests, and keys of requests to cancel."""
        taken: list[Request | Key] = []
        if self.is_empty():
            return taken
        with self._lock:
            self._untaken = []
            with contextlib.suppress(Empty):
                while True:
                    taken.append(self._messages.get_nowait())
        return taken

    def set_waiting(self, queue: Sequence[QueuedRequest]) -> None:
        """Update the snapshot of the scheduler's queue."""
        if not (self._waiting or queue):
            return  # nothing changes, and a concurrent `submit` adds itself
        with self._lock:
            self._waiting = [*queue, *self._untaken]

    def wait(self) -> None:
        """Block until something is left or the inbox is closed."""
        self._wake_up.wait()
        self._wake_up.clear()
