"""Collectives through memory that all ranks of a group on one host have mapped: pointers and sizes for csrc/shared_memory_collectives.cpp."""

import ctypes
import mmap
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.native.library import Native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What is summed."""
BUFFER_BYTES = 2**20
"""Of a message that passes at once. A rank has two such buffers."""
SPINS = 4000
"""Looks before a waiting rank gives its core away: about 100 us. None where there are fewer cores than ranks."""


def memory_bytes(size: int) -> int:
    """What a group of so many ranks maps: a line of state, offsets and two buffers for each."""
    heads = size * (128 + 2 * 8 * (size + 1))
    return -(-heads // 4096) * 4096 + 2 * size * BUFFER_BYTES


class CollectiveFailed(dist.DistError):
    """A collective has failed, and every later one of this group will: how, and because of which rank of the group."""

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
    """``SharedMemoryCollectives`` of csrc/shared_memory_collectives.cpp."""

    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("pidfds", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rank", "size", "buffer_bytes")),
        ("timeout_s", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("arrived", "pieces", "spins", "failed_rank")),
    )


class SharedMemoryCollectives:
    """One group of this process. Members call the same functions in the same order, with messages that fit together."""

    def __init__(
        self, library: Native, memory: mmap.mmap, rank: int, size: int, *, pidfds: Sequence[int], timeout_s: float, spins: int
    ) -> None:
        """``memory`` is `memory_bytes` long and was zero when the first member mapped it. ``pidfds`` are pidfds of the members'
        processes by rank, -1 where there is none; they are closed with the exchange."""
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
        """Sum contiguous ``x`` of one of `DTYPES` in place, in rank order; half precision is added up in float32 and rounded once.

        Raises:
            CollectiveFailed: as every function here; a wait ends when a peer's process has, or after ``timeout_s``.
        """
        self._call(self._library.all_reduce[x.dtype], x.data_ptr(), x.numel())
        return x

    def all_gather(self, x: Tensor, out: Tensor, rows: int, widths: Sequence[int]) -> None:
        """Of each rank ``rows`` stretches of ``widths[rank]`` bytes, all ranks' side by side in every row of ``out``."""
        self._call(self._library.all_gather, x.data_ptr(), out.data_ptr(), rows, self._sizes(widths))

    def all_to_all(self, x: Tensor, out: Tensor, sends: Sequence[int], receives: Sequence[int]) -> None:
        """``sends[r]`` bytes of ``x`` to rank r, ``receives[r]`` bytes of ``out`` from it, in rank order."""
        self._call(self._library.all_to_all, x.data_ptr(), out.data_ptr(), self._sizes(sends), self._sizes(receives))

    def close(self) -> None:
        """Tell the peers that this rank takes no further part."""
        if self._at:
            self._library.leave(self._at)
            self._at = 0
            for lifeline in self._lifelines:
                if lifeline >= 0:
                    os.close(lifeline)

    def _call(self, function: "ctypes._NamedFuncPointer", *arguments: object) -> None:
        self.conclude(function(self.begin(), *arguments))

    def begin(self) -> int:
        """The address of what csrc/shared_memory_collectives.cpp knows, for a kernel that sums by itself, and returns what `conclude` is then to be told."""
        if self._failed is not None:
            raise self._failed
        if not self._at:
            raise RuntimeError("this exchange has been closed")
        return self._at

    def conclude(self, outcome: int) -> None:
        if outcome:
            self._failed = CollectiveFailed(_FAILURES[outcome].format(timeout_s=self.timeout_s), int(self._state.failed_rank))
            self._library.leave(self._at)  # the others need not wait for their own time to pass
            raise self._failed

    def _sizes(self, sizes: Sequence[int]) -> "ctypes.Array[ctypes.c_int64]":
        return (ctypes.c_int64 * self.size)(*sizes)
