"""SIGINT and SIGTERM for a server in the foreground: they raise KeyboardInterrupt during the start, and set flags afterwards. The third one
ends the process in seconds, whatever it waits for. Signals in quick succession count as one (`SAME_S`)."""

import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM)
LAST = 3
"""The signal after which nothing is waited for."""
LAST_S = 5.0
"""Time that the process has to clean up after `LAST` signals."""
SAME_S = 0.5
"""A signal that comes within this time after one that counted does not count: wrappers pass on what the terminal has already sent to the
whole process group, or send SIGTERM after its SIGINT, within milliseconds, or more where the machine is busy. So a double press counts as
one: whoever means two presses again, but requests that a duplicate has ended are lost. Keys that are held or hit again and again count
once in this time."""
INTERRUPTED = 130
"""Exit status of a process that had to be ended."""


def end_process() -> None:
    """End this process at once. What it has started on this machine is ended by `serve.process_reaper`."""
    with suppress(OSError):
        os.write(2, f"\nRay has not ended within {LAST_S:g} s; it is not waited for any longer\n".encode())
    os._exit(INTERRUPTED)


class DistinctSignals:
    """Tells signals that count from those that repeat one; see `SAME_S`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counted_s = -math.inf

    def counts(self) -> bool:
        """Whether a signal that comes now counts."""
        now_s = self._clock()
        if now_s < self._counted_s + SAME_S:
            return False
        self._counted_s = now_s
        return True


class StopSignals:
    """Signal handlers, to be used in the main thread."""

    def __init__(self, *, end_process: Callable[[], None] = end_process, clock: Callable[[], float] = time.monotonic) -> None:
        self.starting = True
        self.stopped = threading.Event()
        """Set by the first signal."""
        self.repeated = threading.Event()
        """Set by the second one: whoever sends it does not want to wait for running requests."""
        self._has_given_up = False
        self._end_process = end_process
        self._clock = clock
        self._distinct = DistinctSignals(clock)
        self._before: dict[int, Any] = {}
        """The handlers that ours replaced."""
        self._wakeup: int | None = None
        """The file descriptor to which Python writes every signal."""
        self._wakeup_before = -1

    @contextmanager
    def handled(self) -> Iterator[None]:
        self.install()
        try:
            yield
        finally:
            self.restore()

    def install(self) -> None:
        """Install the handlers; again after Ray has installed its own."""
        if self._wakeup is None:
            reader, self._wakeup = os.pipe()
            os.set_blocking(self._wakeup, False)
            self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
            already = int(self.stopped.is_set())
            threading.Thread(target=self._watch, args=(reader, already), name="stop-signals", daemon=True).start()
        for number in NUMBERS:
            self._before.setdefault(number, signal.signal(number, self._on_signal))

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._wakeup)
            self._wakeup = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._distinct.counts():
            return
        is_last = self.repeated.is_set() and not self._has_given_up
        if self.stopped.is_set():
            self.repeated.set()
        self.stopped.set()
        if self.starting or is_last:
            self._has_given_up = is_last
            self.starting = False
            raise KeyboardInterrupt

    def _watch(self, reader: int, num_signals: int) -> None:
        """End the process if the handlers are still there `LAST_S` after the last signal. Python runs handlers in the main thread only when
        that runs Python, which it does not while it waits inside Ray, and it runs one handler for several signals; this thread sees each.
        """
        distinct = DistinctSignals(self._clock)  # its own: it may see signals earlier than the handlers
        try:
            while num_signals < LAST:
                if not (numbers := os.read(reader, 64)):
                    return  # restored
                num_signals += sum(number in NUMBERS and distinct.counts() for number in numbers)
            deadline = time.monotonic() + LAST_S
            while (left_s := deadline - time.monotonic()) > 0:
                if select.select([reader], [], [], left_s)[0] and not os.read(reader, 64):
                    return
            self._end_process()
        finally:
            os.close(reader)
