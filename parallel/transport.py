"""How the members of one group communicate: a torch process group, and faster paths through shared or symmetric memory if available."""

from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from parallel.native.shared_memory_collectives import SharedMemoryCollectives
from parallel.symmetric_memory import SymmetricMemory

Backend = Literal["nccl", "gloo"]


@dataclass(frozen=True, eq=False)
class Transport:
    """Carries the collectives of one group. Groups with the same ranks share a transport."""

    backend: Backend
    process_group: dist.ProcessGroup
    shared_memory: SharedMemoryCollectives | None = None
    """Faster path for all-reduce, all-gather and all-to-all, if all ranks of the group are on one host and have the kernels."""

    symmetric_memory: SymmetricMemory | None = None
    """Faster path for all-reduces of the supported dtype and sizes, if all devices of the group map each other's memory."""

    def __str__(self) -> str:
        faster = "shared memory" if self.shared_memory is not None else self.symmetric_memory
        return self.backend if faster is None else f"{faster}, {self.backend} for the rest"
