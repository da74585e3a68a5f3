"""Agreement on weight kinds between hosts with different processors, for weights that move between ranks."""

import torch

from parallel.collectives import all_gather
from parallel.groups import Group
from parallel.native.library import DOT_KINDS, KINDS, available_kinds

ALL = (*KINDS, *dict.fromkeys(kind for kinds in DOT_KINDS.values() for kind in kinds))
"""In the same order on all ranks."""


def common_kinds(group: Group) -> frozenset[str]:
    """The weight kinds that every member of the group has kernels for. All members must call this, and get the same."""
    here = available_kinds()
    bits = torch.tensor([[kind in here for kind in ALL]], dtype=torch.int64)
    held_by_all = all_gather(bits, group, dim=0).all(0).tolist()
    return frozenset(kind for kind, is_held in zip(ALL, held_by_all, strict=True) if is_held)
