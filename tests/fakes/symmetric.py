"""Symmetric memory of ranks on a CPU: a `SymmetricMemoryProvider` whose sums go over the process group, in rank order and rounded at every
addition, as the kernels do it. Tests can make it fail."""

from collections import Counter
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Trouble = Literal["none", "no device", "no rendezvous", "same device", "wrong", "wrong above", "apart", "raises", "no capture"]


class SlowMaker:
    """``trouble`` strikes the last rank alone, but for wrong sums and those that raise, which all ranks see. ``has_multicast``
    is this rank's own."""

    def __init__(self, rank: int, size: int, *, has_multicast: bool = False, trouble: Trouble = "none", ordinal: int | None = None) -> None:
        self._rank, self._is_last, self._has_multicast, self.trouble = rank, rank == size - 1, has_multicast, trouble
        self._ordinal = rank if ordinal is None else ordinal
        self._process_group: dist.ProcessGroup | None = None
        self._buffer = torch.empty(0)
        self.calls: Counter[str] = Counter()

    @property
    def operations(self) -> "SlowMaker":
        return self

    def obstacle(self, _device: torch.device) -> str | None:
        return "a device of long ago" if self.trouble == "no device" and self._is_last else None

    def identity(self, _device: torch.device) -> tuple[int, str]:
        return self._ordinal, "one" if self.trouble == "same device" else f"device {self._rank}"

    def make(self, process_group: dist.ProcessGroup, count: int, _device: torch.device) -> tuple[Tensor, bool]:
        if self.trouble == "no rendezvous" and self._is_last:
            raise RuntimeError("handles do not travel here")
        self._process_group, self._buffer = process_group, torch.zeros(count, dtype=torch.bfloat16)
        return self._buffer, self._has_multicast

    def capture(self, compute: Callable[[], None], _device: torch.device) -> Callable[[], None]:
        """What stands for capturing a graph."""
        if self.trouble == "no capture" and self._is_last:
            raise RuntimeError("operation not permitted")
        return compute

    def one_shot_all_reduce(self, buffer: Tensor, reduce_op: str, group_name: str) -> Tensor:
        self.calls["one shot"] += 1
        return self._sum(buffer, reduce_op, group_name)

    def two_shot_all_reduce_(self, buffer: Tensor, reduce_op: str, group_name: str) -> Tensor:
        self.calls["two shot"] += 1
        return buffer.copy_(self._sum(buffer, reduce_op, group_name))

    def multimem_all_reduce_(self, buffer: Tensor, reduce_op: str, group_name: str) -> Tensor:
        assert self._has_multicast
        self.calls["multimem"] += 1
        return buffer.copy_(self._sum(buffer, reduce_op, group_name))

    def _sum(self, buffer: Tensor, reduce_op: str, group_name: str) -> Tensor:
        assert self._process_group is not None
        assert (reduce_op, group_name) == ("sum", self._process_group.group_name)
        assert buffer.is_contiguous()
        assert buffer.untyped_storage().data_ptr() == self._buffer.untyped_storage().data_ptr(), "it is not symmetric"
        everyones = [torch.empty_like(buffer) for _ in range(self._process_group.size())]
        dist.all_gather(everyones, buffer, group=self._process_group)
        if self.trouble == "raises":
            raise RuntimeError("it cannot be launched")
        total = everyones[0].clone()
        for one in everyones[1:]:
            total += one
        if self.trouble == "wrong" or (self.trouble == "wrong above" and buffer.nbytes > 1 << 18):
            total += 1
        if self.trouble == "apart" and self._is_last:
            total[0] = torch.nextafter(total[0], total[0] + 1)
        return total
