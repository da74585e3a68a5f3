"""How the members of one group talk: a torch process group, and shared memory in front of it where there is some."""

from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from parallel.native.exchange import Exchange

Backend = Literal["nccl", "gloo"]


@dataclass(frozen=True, eq=False)
class Transport:
    """What carries the collectives of one group. Groups of the same ranks share one."""

    backend: Backend
    process_group: dist.ProcessGroup
    shared_memory: Exchange | None = None
    """The faster way for sums, gathers and exchanges, when all ranks of the group are on one host and have the kernels."""

    def __str__(self) -> str:
        return self.backend if self.shared_memory is None else f"shared memory, {self.backend} for the rest"
