"""Memory of a rank's GPU: weights, KV, activations of the heaviest step, and a reserve."""

from dataclasses import dataclass

from parallel.axes import split
from parallel.topology import Coordinates, Topology
from serve.planning.formats import ACTIVATION_BYTES, Format
from serve.planning.shape import ModelShape, MoeShape
from serve.planning.weights import RankWeights, count_sparse, heads_of, layers_of, weights_of_rank

GIB = 2**30
USABLE_FRACTION = 0.9
"""Fraction of a GPU's memory that is used, like `engine.run.memory.CUDA_FRACTION`: the allocator cannot use all of it."""
RUNTIME_BYTES = GIB // 2
"""CUDA context with kernels and libraries. An assumption: it depends on the driver."""
COMMUNICATOR_BYTES = GIB // 2
"""NCCL buffers, if a replica has several ranks. Also an assumption."""
FLOAT32_BYTES, FLOAT64_BYTES = 4, 8
SAMPLING_PIECE = 2**23
"""Number of probabilities that `engine.run.sampling.filters` holds in float64 at a time."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The workload of all replicas together."""

    context_tokens: int
    """Tokens per sequence, prompt plus answer."""
    concurrency: int
    """Concurrent sequences."""
    step_tokens: int
    """Maximum tokens per step, on each dp position (`engine.max_step_tokens`)."""
    block_tokens: int = 16
    kv_element_bytes: int = ACTIVATION_BYTES
    """Bytes per element of the KV cache (`runner.kv_dtype`)."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Memory of one rank's GPU, in bytes. What weights, activations and reserve leave is for KV."""

    weights: RankWeights
    activation_bytes: int
    kv_bytes_per_token: int
    reserve_bytes: int
    gpu_bytes: int
    draft_bytes: int = 0
    """Weights of the draft model, on a rank that samples."""
    draft_kv_bytes_per_token: int = 0

    @property
    def held_weights_bytes(self) -> int:
        """All weights on this rank."""
        return self.weights.num_bytes + self.draft_bytes

    @property
    def held_kv_bytes_per_token(self) -> int:
        """KV bytes per token, of the model and of the draft model."""
        return self.kv_bytes_per_token + self.draft_kv_bytes_per_token

    @property
    def kv_budget_bytes(self) -> int:
        """Bytes left for KV; negative if memory is missing."""
        return self.gpu_bytes - self.reserve_bytes - self.activation_bytes - self.held_weights_bytes

    def kv_tokens(self, block_tokens: int) -> int:
        """Tokens in whole blocks that fit."""
        return max(0, self.kv_budget_bytes) // (self.held_kv_bytes_per_token * block_tokens) * block_tokens


def memory_of_rank(
    shape: ModelShape,
    topology: Topology,
    rank: int,
    *,
    format: Format,
    gpu_bytes: int,
    workload: Workload,
    running: int,
    redundant_experts: int = 0,
    draft: ModelShape | None = None,
) -> RankMemory:
    """``running``: concurrent sequences of the replica. All of them count on each dp position, as in the step by which the engine
    measures its memory at the start (`engine.run.warm_up.full_step`).

    The ranks that sample hold all of the ``draft`` model (`engine.run.runner.sampling_ranks`)."""
    rows = min(running, workload.step_tokens)
    at = topology.coordinates(rank)
    here = draft if at.tp == 0 and at.pp == topology.pp - 1 else None
    whole = Topology()
    return RankMemory(
        weights=weights_of_rank(shape, topology, at, format, redundant_experts=redundant_experts),
        activation_bytes=activation_bytes(shape, topology, at, tokens=workload.step_tokens, rows=rows),
        kv_bytes_per_token=kv_bytes_per_token(shape, topology, at, workload.kv_element_bytes),
        reserve_bytes=gpu_bytes - int(gpu_bytes * USABLE_FRACTION) + RUNTIME_BYTES + (COMMUNICATOR_BYTES if topology.size > 1 else 0),
        gpu_bytes=gpu_bytes,
        draft_bytes=weights_of_rank(here, whole, whole.coordinates(0), format if format.quantize else here.format).num_bytes if here else 0,
        draft_kv_bytes_per_token=kv_bytes_per_token(here, whole, whole.coordinates(0), workload.kv_element_bytes) if here else 0,
    )


def kv_bytes_per_token(shape: ModelShape, topology: Topology, at: Coordinates, element_bytes: int = ACTIVATION_BYTES) -> int:
    """KV bytes per token of the rank's layers and KV heads, as `model.kv_cache.KvLayout` counts them."""
    heads = heads_of(shape, topology, at)
    return 2 * len(layers_of(shape, topology, at)) * len(heads.kv) * shape.head_dim * element_bytes


def activation_bytes(shape: ModelShape, topology: Topology, at: Coordinates, *, tokens: int, rows: int) -> int:
    """Peak memory of a step besides weights and KV: the residual stream plus the largest part of a layer or of the sampling.

    ``tokens`` pass the layers, ``rows`` of them get logits. Counted from the tensors that are alive at the same time in `model/` and
    `engine/run/sampling`; workspaces of attention kernels are not included.
    """
    parts = [_norm(shape, tokens), _attention(shape, topology, at, tokens)]
    layers = layers_of(shape, topology, at)
    num_sparse = count_sparse(shape, layers)
    if num_sparse < len(layers):
        parts.append(_mlp(shape.hidden_size, shape.intermediate_size, topology, at, tokens))
    if shape.moe is not None and num_sparse:
        shared = _mlp(shape.hidden_size, shape.moe.shared_intermediate_size, topology, at, tokens)
        parts.append(max(_routed(shape.hidden_size, shape.moe, topology, at, tokens), shared))
    residual = tokens * shape.hidden_size * ACTIVATION_BYTES
    end = _logits(shape, topology, at, rows) if at.pp == topology.pp - 1 else 0
    return residual + max(*parts, end)


def _norm(shape: ModelShape, tokens: int) -> int:
    """The addend, the sum, its float32 copy, the square or product of that, and the result."""
    return tokens * shape.hidden_size * (2 * FLOAT32_BYTES + 3 * ACTIVATION_BYTES)


def _attention(shape: ModelShape, topology: Topology, at: Coordinates, tokens: int) -> int:
    """Input, fused projections, rotated queries and keys, attended values, output."""
    heads = heads_of(shape, topology, at)
    query, kv = len(heads.query) * shape.head_dim, len(heads.kv) * shape.head_dim
    features = shape.hidden_size + (query + 2 * kv) + (query + kv) + query + shape.hidden_size
    return tokens * features * ACTIVATION_BYTES


def _mlp(hidden_size: int, inner_size: int, topology: Topology, at: Coordinates, tokens: int) -> int:
    """Input, gate and up, the activated gate, its product with up, output."""
    inner = len(split(inner_size, at.tp, topology.tp))
    return tokens * (2 * hidden_size + 4 * inner) * ACTIVATION_BYTES


def _routed(hidden_size: int, moe: MoeShape, topology: Topology, at: Coordinates, tokens: int) -> int:
    """Input and output; then the larger of: the rows gathered for this rank's experts with their outputs (in parts and concatenated), or
    these outputs, reordered and weighted; and the sum in float32 and rounded.

    With dp, a stage sees the tokens of all its ranks; rows for experts on other ranks are not gathered.
    """
    assigned = tokens * topology.dp * moe.experts_per_token
    here = assigned * len(split(moe.num_experts, at.ep, topology.ep)) // moe.num_experts
    rows = max(3 * here, here + 2 * assigned) + 3 * tokens
    return hidden_size * (rows * ACTIVATION_BYTES + tokens * FLOAT32_BYTES)


def _logits(shape: ModelShape, topology: Topology, at: Coordinates, rows: int) -> int:
    """A rank's own logits and the gathered logits of all ranks; on ranks that sample also a float32 copy and probabilities of one piece."""
    own = len(split(shape.vocab_size, at.tp, topology.tp)) if topology.tp > 1 else 0
    logits = rows * shape.vocab_size
    num_bytes = (rows * own + logits) * ACTIVATION_BYTES
    if at.tp == 0:
        num_bytes += logits * FLOAT32_BYTES + min(logits, SAMPLING_PIECE) * 3 * FLOAT64_BYTES
    return num_bytes
