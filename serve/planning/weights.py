"""Size of one rank's weights, with the same shares that the layers in `model/` read from a checkpoint.

D model width, V vocabulary, E experts. A test compares these sums with tensors that `model.load` allocated.
"""

from dataclasses import dataclass
from functools import cache

from model.share_alignment import share_alignment
from parallel.axes import HeadShare, Share, head_share, split, whole
from parallel.topology import Coordinates, Topology
from serve.planning.formats import ACTIVATION_BYTES, Format
from serve.planning.shape import ModelShape


@dataclass(frozen=True)
class WeightSize:
    """Number and bytes of some weights."""

    weights: int = 0
    num_bytes: int = 0

    def __add__(self, other: "WeightSize") -> "WeightSize":
        return WeightSize(self.weights + other.weights, self.num_bytes + other.num_bytes)

    def __mul__(self, times: int) -> "WeightSize":
        return WeightSize(self.weights * times, self.num_bytes * times)


@dataclass(frozen=True, kw_only=True)
class RankWeights:
    """One rank's weights, grouped by how often a step reads them."""

    every_token: WeightSize
    """Weights that every token uses: attention, dense MLPs, shared experts, routers, norms and biases."""
    routed: WeightSize
    """Routed experts, each counted once; a step reads those that its tokens were routed to."""
    redundant: WeightSize
    """Room for redundant copies of routed experts. A copy takes over tokens of its original, so a step reads no more for it."""
    head: WeightSize
    """Rows of the output head; zero except on the last stage."""
    embedding: WeightSize
    """Rows of the embedding, of which a step reads few; zero where they are the head's rows (tied embeddings)."""

    @property
    def num_bytes(self) -> int:
        return sum(held.num_bytes for held in (self.every_token, self.routed, self.redundant, self.head, self.embedding))


_head_share = cache(head_share)  # thousands of layouts need the same few shares; likewise for the functions below
_share_alignment = cache(share_alignment)


def heads_of(shape: ModelShape, topology: Topology, at: Coordinates) -> HeadShare:
    return _head_share(shape.num_heads, shape.num_kv_heads, at.tp, topology.tp)


def layers_of(shape: ModelShape, topology: Topology, at: Coordinates) -> range:
    """As `parallel.pipeline.stage_layers`."""
    (span,) = split(shape.num_layers, at.pp, topology.pp).spans
    return span


@cache
def count_sparse(shape: ModelShape, layers: range) -> int:
    return sum(map(shape.is_sparse, layers))


def weights_of_rank(shape: ModelShape, topology: Topology, at: Coordinates, format: Format, *, redundant_experts: int = 0) -> RankWeights:
    """Weights of the rank at these coordinates. ``redundant_experts``: extra experts per layer on each ep position."""
    if format.where_cut is not None and format.group is not None and _share_alignment(shape, topology) % format.group:
        format = format.where_cut
    layers = layers_of(shape, topology, at)
    num_sparse = count_sparse(shape, layers)
    num_dense = len(layers) - num_sparse
    every_token = _attention(shape, heads_of(shape, topology, at), format) * len(layers)
    if num_dense:
        every_token += _mlp(shape.hidden_size, shape.intermediate_size, at.tp, topology.tp, format) * num_dense
    routed, redundant = WeightSize(), WeightSize()
    if shape.moe is not None and num_sparse:
        shared = _mlp(shape.hidden_size, shape.moe.shared_intermediate_size, at.tp, topology.tp, format)
        every_token += (shared + _plain((shape.moe.num_experts + 1) * shape.hidden_size)) * num_sparse  # router, shared expert's gate
        expert = _mlp(shape.hidden_size, shape.moe.expert_intermediate_size, at.expert_tp, topology.expert_tp, format)
        share = len(split(shape.moe.num_experts, at.ep, topology.ep))
        room = min(shape.moe.num_experts, share + redundant_experts)  # as `parallel.expert_balance.even_capacity`, which needs torch
        routed, redundant = expert * (share * num_sparse), expert * ((room - share) * num_sparse)
    num_rows = len(split(shape.vocab_size, at.tp, topology.tp))
    rows = WeightSize(num_rows * shape.hidden_size, format.table_bytes(num_rows, whole(shape.hidden_size)))
    is_first, is_last = at.pp == 0, at.pp == topology.pp - 1
    if is_last:
        every_token += _plain(shape.hidden_size)  # the last norm
    return RankWeights(
        every_token=every_token,
        routed=routed,
        redundant=redundant,
        head=rows if is_last else WeightSize(),
        embedding=rows if is_first and not (is_last and shape.tied_embeddings) else WeightSize(),
    )


@cache
def _attention(shape: ModelShape, heads: HeadShare, format: Format) -> WeightSize:
    """Attention of one layer, including both norms."""
    query, kv = heads.query.scaled(shape.head_dim), heads.kv.scaled(shape.head_dim)
    fused = len(query) + 2 * len(kv)
    qkv = _matrix(fused, whole(shape.hidden_size), format)
    output = _matrix(shape.hidden_size, query, format)
    return qkv + output + _plain((fused if shape.qkv_bias else 0) + 2 * shape.hidden_size)


@cache
def _mlp(hidden_size: int, inner_size: int, rank: int, ranks: int, format: Format) -> WeightSize:
    """Gate, up and down of one gated MLP."""
    inner = split(inner_size, rank, ranks)
    return _matrix(2 * len(inner), whole(hidden_size), format) + _matrix(hidden_size, inner, format)


def _matrix(out_features: int, in_share: Share, format: Format) -> WeightSize:
    return WeightSize(out_features * len(in_share), format.matrix_bytes(out_features, in_share))


def _plain(weights: int) -> WeightSize:
    return WeightSize(weights, weights * ACTIVATION_BYTES)
