"""How the shares of ranks divide the input features of a model's large matrices. Does not import torch, because planning uses it."""

from math import gcd
from typing import Protocol

from parallel.axes import head_share, split
from parallel.topology import Topology


class ExpertWidths(Protocol):
    @property
    def expert_intermediate_size(self) -> int: ...
    @property
    def shared_intermediate_size(self) -> int: ...


class Widths(Protocol):
    """Fields as in `model.config.ModelConfig`."""

    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def moe(self) -> ExpertWidths | None: ...


def share_alignment(model: Widths, topology: Topology) -> int:
    """The largest number of input features such that every share starts at a multiple of it; 0 if nothing is split.

    18,944 inner features, heads of 128:   tp 4: 4,736 = 37 x 128 each -> 128     tp 8: 2,368 = 18.5 x 128 -> 64
    """
    heads = (head_share(model.num_heads, model.num_kv_heads, rank, topology.tp).query for rank in range(topology.tp))
    shares = [share.scaled(model.head_dim) for share in heads]
    widths = [(model.intermediate_size, topology.tp)]
    if model.moe is not None:
        widths += [(model.moe.shared_intermediate_size, topology.tp), (model.moe.expert_intermediate_size, topology.expert_tp)]
    shares += [split(width, rank, ranks) for width, ranks in widths for rank in range(ranks)]
    return gcd(*(span.start for share in shares for span in share.spans if span.start < share.size))
