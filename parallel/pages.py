"""Memory that goes back to the system early, so that what is loaded does not lie there twice."""

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch import Tensor

MIB = 2**20
_LIBC = ctypes.CDLL(None, use_errno=True)
_DONTNEED = 4  # MADV_DONTNEED, see madvise(2)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # see mallopt(3)


@contextmanager
def freed_at_once() -> Iterator[None]:
    """For the length of a block, blocks of 4 MiB and more go back to the system when they are freed.

    glibc begins so, but keeps ever larger ones (up to 32 MiB) once such were freed, and what lies between others then stays: 0.5 GiB
    were seen after loading. That is right for computing, where the next step wants the same again, and so it is afterwards.
    """
    _mallopt(_MMAP_THRESHOLD, 4 * MIB)
    try:
        yield
    finally:
        _mallopt(_MMAP_THRESHOLD, 32 * MIB)
        _mallopt(_TRIM_THRESHOLD, 64 * MIB)
        with suppress(AttributeError):
            _LIBC.malloc_trim(0)


def _mallopt(parameter: int, value: int) -> None:
    with suppress(AttributeError):  # another C library
        _LIBC.mallopt(parameter, value)


def give_back(tensor: Tensor) -> None:
    """Let go of all pages that lie wholly within a contiguous ``tensor`` of the CPU; whatever is read there afterwards is 0.

    Only for memory that is about to be freed anyway. What the system refuses stays until then.
    """
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > first:
        _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _DONTNEED)
