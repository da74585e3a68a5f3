"""Collectives between the ranks of a group on one host through shared memory: the ctypes side of csrc/shared_memory_collectives.cpp."""

import ctypes
import mmap
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.native.library import Native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that can be summed."""
BUFFER_BYTES = 2**20
"""Size of one buffer, and so of one piece of a message. Each rank has two buffers."""
SPINS = 4000
"""Polls before a waiting rank yields its core: about 100 us. 0 is used where there are fewer cores than ranks."""


def memory_bytes(size: int) -> int:
    """Size of the shared mapping of a group of ``size`` ranks: for each a line of state, offsets and two buffers."""
    heads = size * (128 + 2 * 8 * (size + 1))
    return -(-heads // 4096) * 4096 + 2 * size * BUFFER_BYTES


class CollectiveFailed(dist.DistError):
    """A collective failed because of ``rank`` (position in the group). Every later collective of the group fails too."""

    def __init__(self, kind: str, rank: int) -> None:
        super().__init__(f"rank {rank} of the group {kind}")
        self.rank = rank


_FAILURES = {
    1: "has left it",
    2: "has ended without a word",
    3: "did not come within {timeout_s:g} s",
    4: "sends another number of bytes than is expected of it",
}


class _State(ctypes.Structure):
    """Mirrors struct ``SharedMemoryCollectives`` of csrc/shared_memory_collectives.cpp."""

    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("pidfds", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rank", "size", "buffer_bytes")),
        ("timeout_s", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("arrived", "pieces", "spins", "failed_rank")),
    )


class SharedMemoryCollectives:
    """This process's membership in one group. All members must call the same functions in the same order with matching sizes."""

    def __init__(
        self, library: Native, memory: mmap.mmap, rank: int, size: int, *, pidfds: Sequence[int], timeout_s: float, spins: int
    ) -> None:
        """``memory`` is `memory_bytes` long and was zeroed before the first member mapped it. ``pidfds`` are the members' pidfds by rank,
        -1 where there is none; `close` closes them."""
        self._library, self._memory, self._lifelines = library, memory, (ctypes.c_int32 * size)(*pidfds)
        self._mapped = ctypes.c_char.from_buffer(memory)
        self._state = _State(
            memory=ctypes.addressof(self._mapped),
            pidfds=ctypes.addressof(self._lifelines),
            rank=rank,
            size=size,
            buffer_bytes=BUFFER_BYTES,
            timeout_s=timeout_s,
            spins=spins,
        )
        self._at = ctypes.addressof(self._state)
        self._failed: CollectiveFailed | None = None
        self.size = size

    @property
    def timeout_s(self) -> float:
        return float(self._state.timeout_s)

    @timeout_s.setter
    def timeout_s(self, value: float) -> None:
        self._state.timeout_s = value

    def all_reduce_(self, x: Tensor) -> Tensor:
        """Sum contiguous ``x`` of one of `DTYPES` in place, in rank order. Half precision is accumulated in float32 and rounded once.

        Raises:
            CollectiveFailed: as every collective here. Waiting for a peer ends when its process has ended, or after ``timeout_s``.
        """
        self._call(self._library.all_reduce[x.dtype], x.data_ptr(), x.numel())
        return x

    def all_gather(self, x: Tensor, out: Tensor, rows: int, widths: Sequence[int]) -> None:
        """Gather ``rows`` rows of ``widths[rank]`` bytes from each rank; a row of ``out`` holds all ranks' rows side by side."""
        self._call(self._library.all_gather, x.data_ptr(), out.data_ptr(), rows, self._sizes(widths))

    def all_to_all(self, x: Tensor, out: Tensor, sends: Sequence[int], receives: Sequence[int]) -> None:
        """Send ``sends[r]`` bytes of ``x`` to rank r and receive ``receives[r]`` bytes of ``out`` from it, both in rank order."""
        self._call(self._library.all_to_all, x.data_ptr(), out.data_ptr(), self._sizes(sends), self._sizes(receives))

    def close(self) -> None:
        """Leave the group: peers that wait for this rank fail at once."""
        if self._at:
            self._library.leave(self._at)
            self._at = 0
            for lifeline in self._lifelines:
                if lifeline >= 0:
                    os.close(lifeline)

    def _call(self, function: "ctypes._NamedFuncPointer", *arguments: object) -> None:
        self.conclude(function(self.begin(), *arguments))

    def begin(self) -> int:
        """Address of the C++ struct, for a kernel that runs collectives itself; pass its return code to `conclude` afterwards."""
        if self._failed is not None:
            raise self._failed
        if not self._at:
            raise RuntimeError("these collectives have been closed")
        return self._at

    def conclude(self, outcome: int) -> None:
        """Raise `CollectiveFailed` if ``outcome``, the return code of a kernel, is a failure."""
        if outcome:
            self._failed = CollectiveFailed(_FAILURES[outcome].format(timeout_s=self.timeout_s), int(self._state.failed_rank))
            self._library.leave(self._at)  # so that the others fail at once, not after their own timeout
            raise self._failed

    def _sizes(self, sizes: Sequence[int]) -> "ctypes.Array[ctypes.c_int64]":
        return (ctypes.c_int64 * self.size)(*sizes)
