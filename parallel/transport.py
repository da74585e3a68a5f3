"""How the members of one group talk: a torch process group, and memory that they share in front of it where there is some."""

from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from parallel.native.shared_memory_collectives import SharedMemoryCollectives
from parallel.symmetric_memory import SymmetricMemory

Backend = Literal["nccl", "gloo"]


@dataclass(frozen=True, eq=False)
class Transport:
    """What carries the collectives of one group. Groups of the same ranks share one."""

    backend: Backend
    process_group: dist.ProcessGroup
    shared_memory: SharedMemoryCollectives | None = None
    """The faster way for sums, gathers and exchanges, when all ranks of the group are on one host and have the kernels."""

    symmetric_memory: SymmetricMemory | None = None
    """The faster way for sums that it takes, when all devices of the group map each other's memory."""

    def __str__(self) -> str:
        faster = "shared memory" if self.shared_memory is not None else self.symmetric_memory
        return self.backend if faster is None else f"{faster}, {self.backend} for the rest"
