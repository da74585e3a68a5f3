"""Host memory of this process: how much freed memory the allocator retains, and huge pages.

These are hints (mallopt(3) of glibc, madvise(2) of Linux); on systems without them nothing changes.
"""

import ctypes
import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

MIB = 2**20
RETAINED_BYTES = 256 * MIB
"""Freed memory that is retained for the next step: results of products of a long prompt are 40 MB each, and faulting in fresh pages took
a third of their time."""
OLD_LIMIT_BYTES = 32 * MIB
"""The largest M_MMAP_THRESHOLD that glibc before 2.35 accepts."""
HUGE_PAGE_BYTES = 2 * MIB
_LIBC = ctypes.CDLL(None, use_errno=True)
_HUGEPAGE = 14  # MADV_HUGEPAGE, see madvise(2)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # see mallopt(3)


@contextmanager
def return_freed_memory() -> Iterator[None]:
    """Within this context, blocks of 4 MiB and more are returned to the system when they are freed.

    glibc starts like that, but raises its threshold as larger blocks are freed, and free blocks between used ones then stay: 0.5 GiB
    were seen after loading. Retaining is right for computing, as the next step needs the same again; so on exit `RETAINED_BYTES` applies.
    """
    _mallopt(_MMAP_THRESHOLD, 4 * MIB)
    _mallopt(_TRIM_THRESHOLD, 16 * MIB)  # the size of one read, reused by the next
    try:
        yield
    finally:
        if not _mallopt(_MMAP_THRESHOLD, RETAINED_BYTES):
            _mallopt(_MMAP_THRESHOLD, OLD_LIMIT_BYTES)
        _mallopt(_TRIM_THRESHOLD, RETAINED_BYTES)
        with suppress(AttributeError):
            _LIBC.malloc_trim(0)


def _mallopt(parameter: int, value: int) -> bool:
    """Returns whether the setting was accepted."""
    with suppress(AttributeError):  # another C library
        return bool(_LIBC.mallopt(parameter, value))
    return False


def advise_huge_pages(room: Tensor) -> None:
    """Request huge pages for a CPU tensor that has not been written to yet. Weights, read completely in every step, are then read about
    10 % faster."""
    first = -(-room.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES  # of the huge pages completely within the tensor
    end = (room.data_ptr() + room.nbytes) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if end > first:
        with suppress(AttributeError):
            _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _HUGEPAGE)


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """CPU zeros whose pages are allocated when they are first written to; allocating gigabytes at once takes seconds."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes == 0 or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(shape, dtype=dtype)
    room = torch.frombuffer(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)
    advise_huge_pages(room)
    return room.view(dtype).view(shape)
