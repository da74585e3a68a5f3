"""The interface of attention backends: write new K and V to their slots, then attend over each sequence's blocks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.batch import ForwardBatch
from model.rope import Rotation


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """The heads of one rank."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_of_query: tuple[int, ...]
    """KV head (of this rank) of each query head. Groups may differ in size if ranks share heads unevenly."""
    block_tokens: int
    is_causal: bool = True
    """False: every token attends to its whole sequence, which must then be computed in one step."""

    @property
    def is_uniform(self) -> bool:
        """Whether every KV head serves the same number of query heads, in order."""
        group = self.num_heads // self.num_kv_heads
        return self.kv_of_query == tuple(head // group for head in range(self.num_heads))


Attend = Callable[[ForwardBatch], None]


@dataclass(frozen=True)
class GraphBreak:
    """Splits a step that is captured piecewise at an attention call."""

    q_THK: Tensor
    """Where a piece leaves the rotated queries."""
    out_THK: Tensor
    """Where the next piece finds the output of attention."""
    split: Callable[[Attend], None]
    """Ends a piece and begins the next. Takes the function that computes attention between the two, for the sequences of a batch."""


class AttentionBackend(Protocol):
    """Attention with scale ``head_dim ** -0.5``, causal unless its config says otherwise.

    T tokens, H query heads, G KV heads, K head width, N blocks, B block_tokens.
    """

    kv_dtypes: tuple[torch.dtype, ...]
    """Dtypes of the KV cache that are supported in addition to the dtype of the computation."""
    supports_capture: bool
    """Whether a step with one token per sequence may be captured and replayed: its launches then depend only on the number of sequences,
    everything else is read on the device, and a token with a negative slot is not written."""

    supports_graph_breaks: bool
    """Whether `graph_break` is supported, so that any step may be captured piecewise."""
    graph_break: GraphBreak | None
    """Set during a piecewise capture."""

    def prepare(self, batch: ForwardBatch) -> None:
        """Called once per step, before the layers: build what all layers share (index tensors, masks, launch sizes)."""
        ...

    def attend(self, heads_TXK: Tensor, rotation: Rotation, keys_NBGK: Tensor, values_NBGK: Tensor, batch: ForwardBatch) -> Tensor:
        """Attention output (T, H, K). ``heads_TXK`` has each token's query, key and value heads (X = H + 2 G, in this order).

        Rotates queries and keys, and writes keys and values to ``batch.slots_T`` of the cache, before it attends.
        """
        ...
