"""SIGINT and SIGTERM for a server in the foreground: they raise KeyboardInterrupt during the start, and set flags afterwards."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopSignals:
    """Signal handlers, to be used in the main thread."""

    def __init__(self) -> None:
        self.starting = True
        self.stopped = threading.Event()
        """Set by the first signal."""
        self.repeated = threading.Event()
        """Set by the second one: whoever sends it does not want to wait for running requests."""
        self._before: dict[int, Any] = {}
        """The handlers that ours replaced."""

    @contextmanager
    def handled(self) -> Iterator[None]:
        self.install()
        try:
            yield
        finally:
            self.restore()

    def install(self) -> None:
        """Install the handlers; again after Ray has installed its own."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before.setdefault(number, signal.signal(number, self._on_signal))

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stopped.is_set():
            self.repeated.set()
        self.stopped.set()
        if self.starting:
            self.starting = False
            raise KeyboardInterrupt
