"""What every attention backend does: write new K and V to their slots, attend over each sequence's blocks."""

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
    """KV head (of this rank) of each query head; groups may differ in size where ranks share heads unevenly."""
    block_tokens: int
    is_causal: bool = True
    """False: every token sees all of its sequence. What is computed of it must then be all of it, in one step."""

    @property
    def is_uniform(self) -> bool:
        """Whether every KV head serves the same number of query heads, in order."""
        group = self.num_heads // self.num_kv_heads
        return self.kv_of_query == tuple(head // group for head in range(self.num_heads))


Attend = Callable[[ForwardBatch], None]


@dataclass(frozen=True)
class GraphBreak:
    """For a step that is recorded in pieces, from one attention to the next."""

    q_THK: Tensor
    """Where a piece leaves the turned queries, ..."""
    out_THK: Tensor
    """... and where the next finds what attention gave."""
    split: Callable[[Attend], None]
    """Ends a piece, is told what attends from the one to the other for the sequences of a batch, and begins the next piece."""


class AttentionBackend(Protocol):
    """Attention with scale ``head_dim ** -0.5``, causal if its config does not say otherwise.

    T tokens, H query heads, G KV heads, K head width, N blocks, B block_tokens.
    """

    kv_dtypes: tuple[torch.dtype, ...]
    """In which keys and values may be held, beside that in which they are computed."""
    supports_capture: bool
    """Whether a step of sequences with one token each may be captured and replayed: what is launched then depends on their number alone,
    everything else is read on the device, and a token whose slot is below 0 is written nowhere."""

    supports_graph_breaks: bool
    """Whether attention heeds `graph_break`, as a step that is captured in pieces wants it, with anything in it."""
    graph_break: GraphBreak | None
    """While it is captured."""

    def prepare(self, batch: ForwardBatch) -> None:
        """Once per step, before the layers: build what all layers share (index tensors, masks, launch sizes)."""
        ...

    def attend(self, heads_TXK: Tensor, rotation: Rotation, keys_NBGK: Tensor, values_NBGK: Tensor, batch: ForwardBatch) -> Tensor:
        """Of each token's query, key and value heads (X = H + 2 G, in this order) turn queries and keys, write keys and values to
        ``batch.slots_T`` of the cache, then attend: (T, H, K)."""
        ...
