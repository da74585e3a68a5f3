"""Reads byte ranges of a local file or a remote object.

Weights are read, not mapped. Pages of a mapping count towards the process that touched them, so a rank would hold its share twice while
loading. And if a mapped file is truncated or a disk fails, SIGBUS kills the process without a message, whereas a read raises.
"""

import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

T = TypeVar("T")
Range = tuple[int, memoryview]
"""Offset in the file, and the destination of the bytes, whose size says how many."""

PIECE_BYTES = 8 * 2**20
"""Size of one request to remote storage: long enough that the round trip hardly matters."""
CONCURRENT_RANGES = 16
"""Concurrent requests of one rank."""
ATTEMPTS = 6
FIRST_DELAY_S = 0.2
"""Before the second attempt; doubled for each further one, 6 s in total."""
PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)
"""Errors that another attempt does not fix. The stores' libraries have no common base class for those that it may fix."""


class ByteSource(Protocol):
    """A file of known size. Thread-safe."""

    @property
    def name(self) -> str:
        """Path or URL, for messages."""
        ...

    @property
    def size(self) -> int: ...

    @property
    def worthwhile_gap_bytes(self) -> int:
        """The largest gap between two ranges that is read along instead of skipped."""
        ...

    @property
    def bytes_fetched(self) -> int:
        """Bytes read so far, including gaps and repeated attempts."""
        ...

    @property
    def piece_bytes(self) -> int:
        """A good size for one read, if the caller needs no more at a time."""
        ...

    def read(self, ranges: Sequence[Range]) -> None:
        """Fill the destination of every range.

        Raises:
            OSError: it cannot be read, or ends too early.
        """
        ...

    def close(self) -> None: ...


class LocalFile:
    """A file on this host."""

    worthwhile_gap_bytes = 32 * 2**10
    """A system call costs about as much as copying so many bytes, and the kernel reads ahead anyway."""
    piece_bytes = 2**20
    """The size of a processor's L2 cache."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._file = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._file).st_size
        self.bytes_fetched = 0

    def read(self, ranges: Sequence[Range]) -> None:
        for start, target in ranges:
            done = 0
            while done < len(target):  # one call reads at most 2 GiB, see read(2)
                got = os.preadv(self._file, [target[done:]], start + done)
                if got == 0:
                    raise OSError(f"it ends at byte {start + done}")
                done += got
            self.bytes_fetched += done

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class RemoteFile:
    """A remote object, fetched by concurrent range requests. ``fetch(start, stop)`` gets one range."""

    worthwhile_gap_bytes = 2**20
    """A round trip takes as long as fetching some MB."""
    piece_bytes = 4 * PIECE_BYTES

    def __init__(
        self,
        name: str,
        size: int,
        fetch: Callable[[int, int], bytes],
        *,
        sleep: Callable[[float], None] = time.sleep,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self.name, self.size = name, size
        self.bytes_fetched = 0
        self._fetch, self._sleep, self._piece_bytes = fetch, sleep, piece_bytes
        self._threads = ThreadPoolExecutor(CONCURRENT_RANGES, thread_name_prefix="fetch")  # threads start when they are needed

    def read(self, ranges: Sequence[Range]) -> None:
        pieces = [
            (start + done, target[done : done + self._piece_bytes])
            for start, target in ranges
            for done in range(0, len(target), self._piece_bytes)
        ]
        if len(pieces) == 1:
            return self._read_piece(*pieces[0])
        for _ in self._threads.map(self._read_piece, *zip(*pieces, strict=True)) if pieces else ():
            pass

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _read_piece(self, start: int, target: memoryview) -> None:
        target[:] = with_retries(lambda: self._fetch_whole(start, len(target)), sleep=self._sleep)

    def _fetch_whole(self, start: int, length: int) -> bytes:
        content = self._fetch(start, start + length)
        self.bytes_fetched += len(content)
        if len(content) != length:
            raise OSError(f"{length} bytes were asked for from byte {start}, and {len(content)} came")
        return content


def with_retries(act: Callable[[], T], *, sleep: Callable[[float], None] = time.sleep) -> T:
    """The result of ``act``, which is retried with exponential backoff after errors that may be temporary."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return act()
        except PERMANENT_ERRORS:
            raise
        except Exception:
            sleep(FIRST_DELAY_S * 2**attempt * random.uniform(0.5, 1.0))  # noqa: S311  (spreads the ranks' attempts)
    return act()
