"""Lower bounds ("floors") for the time of a layout, from bytes and FLOPs alone. Real servers are slower; none can be faster.

Each weight that a step needs is read once, KV is read once per sequence, and each product is computed once:

    decode   t = max((weight bytes + sequences x context x KV bytes) / bandwidth, products / (FLOP/s)) + all-reduces
    prefill  the same with the tokens of a chunk, plus 2 L H d T^2 products of attention

for the slowest rank of a stage. Pipeline stages overlap as far as there are steps to fill them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.topology import Topology
from serve.planning.formats import ACTIVATION_BYTES, Format
from serve.planning.hardware import Link, Speed
from serve.planning.memory import RankMemory, Workload
from serve.planning.shape import ModelShape
from serve.planning.weights import count_sparse, heads_of, layers_of


@dataclass(frozen=True, kw_only=True)
class Floors:
    """The floors of one replica."""

    token_s: float
    """Seconds between two tokens of a stream, with all running sequences at full context."""
    tokens_per_s: float
    """Throughput of all running sequences together."""
    first_token_s: float
    """Time to the first token of a prompt as long as the context, with nothing else running."""


@dataclass(frozen=True, kw_only=True)
class Replica:
    """What the speed of a replica depends on."""

    shape: ModelShape
    format: Format
    topology: Topology
    ranks: Sequence[RankMemory]
    speed: Speed
    stage_link: Link
    """Link between the ranks of a stage."""
    next_stage_link: Link

    @property
    def flops(self) -> float:
        return self.speed.fp8_flops if self.format.multiplies_fp8 else self.speed.bf16_flops

    @property
    def routed_fraction(self) -> float:
        """Fraction of the routed experts' weights that one token is multiplied with."""
        moe = self.shape.moe
        return moe.experts_per_token / moe.num_experts if moe else 0.0


def floors(replica: Replica, workload: Workload, running: int) -> Floors:
    """The floors with ``running`` sequences decoding concurrently."""
    token_s = _token_s(replica, workload, running)
    return Floors(token_s=token_s, tokens_per_s=running / token_s, first_token_s=_first_token_s(replica, workload))


def _token_s(replica: Replica, workload: Workload, running: int) -> float:
    """There are as many steps in flight as stages, each with its part of the sequences. With fewer sequences than stages, stages idle."""
    stages = replica.topology.pp
    together = -(-running // stages)
    times = [_decode_stage_s(replica, stage, together, workload.context_tokens) for stage in range(stages)]
    return max(times) * stages if running >= stages else sum(times)


def _decode_stage_s(replica: Replica, stage: int, sequences: int, context: int) -> float:
    mine = -(-sequences // replica.topology.dp)
    slowest = max(_decode_rank_s(replica, rank, sequences, mine, context) for rank in _ranks_of(replica, stage))
    return slowest + _exchange_s(replica, stage, mine, sequences)


def _decode_rank_s(replica: Replica, rank: RankMemory, sequences: int, mine: int, context: int) -> float:
    """``mine`` of the ``sequences`` belong to this rank's dp position; its experts serve all of them."""
    read = _read_bytes(replica, rank, sequences) + mine * context * rank.kv_bytes_per_token
    weights = rank.weights
    products = (weights.every_token.weights + weights.head.weights) * mine + weights.routed.weights * replica.routed_fraction * sequences
    return max(read / replica.speed.read_bytes_per_s, 2 * products / replica.flops)


def _first_token_s(replica: Replica, workload: Workload) -> float:
    """The prompt passes the stages in chunks; while one stage computes a chunk, the previous stage computes the next chunk."""
    prompt = workload.context_tokens
    chunks = -(-prompt // workload.step_tokens)
    each = [_prefill_stage_s(replica, stage, prompt, chunks) / chunks for stage in range(replica.topology.pp)]
    return sum(each) + max(each) * (chunks - 1)


def _prefill_stage_s(replica: Replica, stage: int, prompt: int, chunks: int) -> float:
    """Time of all chunks of a prompt on one stage."""
    slowest = max(_prefill_rank_s(replica, place, prompt, chunks) for place in _places_of(replica, stage))
    chunk = prompt / chunks
    return slowest + chunks * _exchange_s(replica, stage, chunk, chunk)


def _prefill_rank_s(replica: Replica, place: int, prompt: int, chunks: int) -> float:
    rank, at = replica.ranks[place], replica.topology.coordinates(place)
    chunk = prompt / chunks
    read = chunks * _read_bytes(replica, rank, chunk) + (chunks + 1) / 2 * prompt * rank.kv_bytes_per_token
    weights = rank.weights
    products = (weights.every_token.weights + weights.routed.weights * replica.routed_fraction) * prompt + weights.head.weights
    layers, heads = len(layers_of(replica.shape, replica.topology, at)), len(heads_of(replica.shape, replica.topology, at).query)
    attention = 2 * layers * heads * replica.shape.head_dim * prompt**2
    return max(read / replica.speed.read_bytes_per_s, 2 * products / replica.flops + attention / replica.speed.bf16_flops)


def _read_bytes(replica: Replica, rank: RankMemory, tokens: float) -> float:
    """Weight bytes that a step of ``tokens`` tokens reads. The few embedding rows are not counted."""
    moe = replica.shape.moe
    used = moe.distinct_experts(tokens) / moe.num_experts if moe else 0.0
    return rank.weights.every_token.num_bytes + rank.weights.head.num_bytes + rank.weights.routed.num_bytes * used


def _exchange_s(replica: Replica, stage: int, mine: float, all_tokens: float) -> float:
    """Communication time: two all-reduces over tp per layer; with dp, one over the stage per sparse layer; then the send to the next
    stage."""
    shape, topology = replica.shape, replica.topology
    layers = layers_of(shape, topology, topology.coordinates(_places_of(replica, stage)[0]))
    hidden_bytes = shape.hidden_size * ACTIVATION_BYTES
    seconds = 2 * len(layers) * replica.speed.link.all_reduce_s(mine * hidden_bytes, topology.tp)
    if topology.dp > 1:
        seconds += count_sparse(shape, layers) * replica.stage_link.all_reduce_s(all_tokens * hidden_bytes, topology.ranks_per_stage)
    if stage < topology.pp - 1:
        seconds += replica.next_stage_link.latency_s + mine * hidden_bytes / replica.next_stage_link.bytes_per_s
    return seconds


def _places_of(replica: Replica, stage: int) -> range:
    per_stage = replica.topology.ranks_per_stage
    return range(stage * per_stage, (stage + 1) * per_stage)


def _ranks_of(replica: Replica, stage: int) -> Sequence[RankMemory]:
    places = _places_of(replica, stage)
    return replica.ranks[places.start : places.stop]
