"""Memory for many tensors of the CPU that are read from end to end at every step: they lie side by side in pages of 2 MiB.

Each by itself would have small pages at both its ends, and one below 2 MiB nothing but these: a third of what a model of 0.5B holds.
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
"""Asked of the system at once, and taken from it as it is written to. What is larger than half of it is alone in a region."""
LINE_BYTES = 64
"""Tensors begin at a line of the processor's cache."""


class Arena:
    """It holds nothing itself: a tensor's pages go back to the system with the tensor, a region with its last one. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._region: Callable[[], mmap.mmap | None] = lambda: None
        self._filled = 0
        """Of the region, in bytes."""

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that nothing has been written to yet."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(shape, dtype=dtype)
        region, start = self._place(-(-num_bytes // LINE_BYTES) * LINE_BYTES)
        part = memoryview(region)[start : start + num_bytes]  # whoever holds it holds the region
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
    """And where in it the first page of 2 MiB begins."""
    region = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without such pages
        region.madvise(mmap.MADV_HUGEPAGE)
    return region, -torch.frombuffer(region, dtype=torch.uint8, count=1).data_ptr() % HUGE_PAGE_BYTES


def _give_back(region: mmap.mmap, start: int, stop: int) -> None:
    """The pages that lie wholly between; what lies in the others goes with the region."""
    first, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first:
        with suppress(OSError):
            region.madvise(mmap.MADV_DONTNEED, first, end - first)
