"""SIGINT and SIGTERM for a server in the foreground: they raise KeyboardInterrupt during the start, and set flags afterwards."""

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
        """Set by the first signal."""
        self.repeated = threading.Event()
        """Set by the second one: whoever sends it does not want to wait for running requests."""

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
        if self.stopped.is_set():
            self.repeated.set()
        self.stopped.set()
        if self.starting:
            self.starting = False
            raise KeyboardInterrupt
