"""Arena allocator for CPU tensors that are read completely in every step: they lie side by side in huge pages of 2 MiB.

Allocated separately, each tensor would have small pages at both ends, and one below 2 MiB only small pages: a third of a 0.5B model.
"""

import math
import mmap
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from parallel.host_memory import HUGE_PAGE_BYTES, MIB

REGION_BYTES = 64 * MIB
"""Reserved at once, and backed by memory as it is written to. A tensor larger than half of it gets a region of its own."""
LINE_BYTES = 64
"""Tensors begin at a cache line."""


class Arena:
    """Keeps no tensor alive: a tensor's pages are returned to the system with the tensor, a region with its last tensor. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._region: Callable[[], mmap.mmap | None] = lambda: None
        self._filled = 0
        """Bytes of the region in use."""

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(shape, dtype=dtype)
        region, start = self._place(-(-num_bytes // LINE_BYTES) * LINE_BYTES)
        part = memoryview(region)[start : start + num_bytes]  # keeps the region alive
        weakref.finalize(part, _give_back, region, start, start + num_bytes).atexit = False
        return torch.frombuffer(part, dtype=dtype).view(shape)

    def _place(self, num_bytes: int) -> tuple[mmap.mmap, int]:
        if num_bytes > REGION_BYTES // 2:
            return _new_region(num_bytes)
        with self._lock:
            region = self._region()
            if region is None or self._filled + num_bytes > len(region):
                region, self._filled = _new_region(REGION_BYTES)
                self._region = weakref.ref(region)
            start, self._filled = self._filled, self._filled + num_bytes
            return region, start


def _new_region(num_bytes: int) -> tuple[mmap.mmap, int]:
    """A new region, and the offset of its first 2 MiB page."""
    region = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without such pages
        region.madvise(mmap.MADV_HUGEPAGE)
    return region, -torch.frombuffer(region, dtype=torch.uint8, count=1).data_ptr() % HUGE_PAGE_BYTES


def _give_back(region: mmap.mmap, start: int, stop: int) -> None:
    """Return the pages that lie completely within; partial ones are freed with the region."""
    first, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first:
        with suppress(OSError):
            region.madvise(mmap.MADV_DONTNEED, first, end - first)
