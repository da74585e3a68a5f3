"""How this process holds memory: what it keeps for its steps, and in pages of which size.

All of it are wishes (mallopt(3) of glibc, madvise(2) of Linux): where they are unknown nothing changes.
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
"""So much of what steps free stays for the next one: the products of a long prompt are 40 MB each, and zeroing their pages anew took a
third of their time."""
OLD_LIMIT_BYTES = 32 * MIB
"""The most that glibc before 2.35 takes for a block that it keeps."""
HUGE_PAGE_BYTES = 2 * MIB
_LIBC = ctypes.CDLL(None, use_errno=True)
_HUGEPAGE = 14  # MADV_HUGEPAGE, see madvise(2)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # see mallopt(3)


@contextmanager
def return_freed_memory() -> Iterator[None]:
    """For the length of a block, blocks of 4 MiB and more go back to the system when they are freed.

    glibc begins so, but keeps ever larger ones once such were freed, and what lies between others then stays: 0.5 GiB were seen after
    loading. That is right for computing, where the next step wants the same again, and so it is afterwards: see `RETAINED_BYTES`.
    """
    _mallopt(_MMAP_THRESHOLD, 4 * MIB)
    _mallopt(_TRIM_THRESHOLD, 16 * MIB)  # what is read at a time, by the next one again
    try:
        yield
    finally:
        if not _mallopt(_MMAP_THRESHOLD, RETAINED_BYTES):
            _mallopt(_MMAP_THRESHOLD, OLD_LIMIT_BYTES)
        _mallopt(_TRIM_THRESHOLD, RETAINED_BYTES)
        with suppress(AttributeError):
            _LIBC.malloc_trim(0)


def _mallopt(parameter: int, value: int) -> bool:
    """Whether it was taken."""
    with suppress(AttributeError):  # another C library
        return bool(_LIBC.mallopt(parameter, value))
    return False


def advise_huge_pages(room: Tensor) -> None:
    """Ask for pages of 2 MiB under a tensor of the CPU that nothing has been written to yet: what is read from end to end at every step is
    then read some 10 % faster."""
    first = -(-room.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES  # of the pages that lie wholly within it
    end = (room.data_ptr() + room.nbytes) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if end > first:
        with suppress(AttributeError):
            _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _HUGEPAGE)


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU whose pages the system takes as they are first written to, and not now: of gigabytes that is seconds."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes == 0 or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(shape, dtype=dtype)
    room = torch.frombuffer(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)
    advise_huge_pages(room)
    return room.view(dtype).view(shape)
