"""SIGINT and SIGTERM for a server in the foreground: they raise KeyboardInterrupt during the start, and set a flag afterwards."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignals:
    """Signal handlers, to be used in the main thread."""

    def __init__(self) -> None:
        self.starting = True
        self.stopped = threading.Event()

    @contextmanager
    def handled(self) -> Iterator[None]:
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.install()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def install(self) -> None:
        """Install the handlers; again after Ray has installed its own."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stopped.set()
        if self.starting:
            self.starting = False
            raise KeyboardInterrupt
