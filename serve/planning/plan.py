"""All layouts of a model on a fleet: the valid ones, best first, and the invalid ones with the reason."""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.run.settings import DtypeName
from parallel.topology import Topology
from serve.planning.errors import PlanError
from serve.planning.floors import Floors, Replica, floors
from serve.planning.formats import Format
from serve.planning.hardware import TYPICAL_SPEED, Fleet, Speed
from serve.planning.memory import RankMemory, Workload, memory_of_rank
from serve.planning.placement import Placement, place_replica
from serve.planning.refusal import Refusal, refuse_axes, refuse_memory
from serve.planning.serving_limits import ServingLimit, serving_limits
from serve.planning.shape import ModelShape

ORDER = (
    "Ranked by: whether all requested sequences fit at full context; then tokens/s of all replicas at best; "
    "then time to the first token at best; then fewer ranks per replica, so that losing one costs less; "
    "then room for more tokens."
)


@dataclass(frozen=True, kw_only=True)
class PlanInputs:
    """The inputs of a plan."""

    shape: ModelShape
    fleet: Fleet
    format: Format
    workload: Workload
    dtype: DtypeName = "auto"
    """`runner.dtype` of the emitted settings. "auto": bfloat16 where it is known that this is meant."""
    redundant_experts: int = 0
    """Extra experts per layer on each ep position (`runner.redundant_experts`)."""
    draft: ModelShape | None = None
    """Shape of the draft model (`runner.draft_model`)."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One valid layout of the model on the fleet."""

    topology: Topology
    placement: Placement
    ranks: tuple[RankMemory, ...]
    kv_tokens: int
    """Tokens of KV that one replica holds."""
    running: int
    """Requested concurrent sequences per replica."""
    at_full_context: int
    """Sequences that fit into one replica at full context, at most ``running``."""
    floors: Floors
    limits: tuple[ServingLimit, ...]
    """Why `manta serve` does not support it today; empty if it does."""

    @property
    def fullest(self) -> RankMemory:
        """The rank with room for the fewest tokens."""
        return min(self.ranks, key=lambda rank: rank.kv_budget_bytes / rank.held_kv_bytes_per_token)

    @property
    def total_kv_tokens(self) -> int:
        return self.kv_tokens * self.placement.replicas

    @property
    def total_tokens_per_s(self) -> float:
        return self.floors.tokens_per_s * self.placement.replicas

    @property
    def is_served_today(self) -> bool:
        return not self.limits

    @property
    def holds_all(self) -> bool:
        return self.at_full_context >= self.running


@dataclass(frozen=True, kw_only=True)
class RefusedLayout:
    sizes: dict[str, int]
    refusal: Refusal


@dataclass(frozen=True, kw_only=True)
class Plan:
    inputs: PlanInputs
    layouts: tuple[Layout, ...]
    """Best first, in the order that `ORDER` describes."""
    refused: tuple[RefusedLayout, ...]

    @property
    def has_floors(self) -> bool:
        """Whether the GPU's speed is known. Otherwise floors are those of a typical GPU, usable for ranking but not to be reported."""
        return self.inputs.fleet.gpu.speed is not None

    def first_served(self) -> Layout | None:
        """The best layout that `manta serve` supports today."""
        return next((layout for layout in self.layouts if layout.is_served_today), None)


def make_plan(inputs: PlanInputs) -> Plan:
    """Plan all layouts.

    Raises:
        PlanError: the context exceeds the model's limit, or redundant experts are requested for a dense model.
    """
    if inputs.redundant_experts and inputs.shape.moe is None:
        raise PlanError(f"{inputs.shape.name} has no experts to replicate; leave out --redundant-experts")
    limit = inputs.shape.max_context_tokens
    if inputs.workload.context_tokens > limit:
        raise PlanError(
            f"{inputs.shape.name} supports at most {limit} tokens, not {inputs.workload.context_tokens}; give --context {limit}, "
            "or add rope_scaling (YaRN) to its config.json and plan from that folder"
        )
    layouts: list[Layout] = []
    refused: list[RefusedLayout] = []
    for sizes in axis_sizes(inputs.fleet.num_gpus, has_experts=inputs.shape.moe is not None):
        found = _lay_out(sizes, inputs)
        if isinstance(found, Layout):
            layouts.append(found)
        else:
            refused.append(RefusedLayout(sizes=sizes, refusal=found))
    return Plan(inputs=inputs, layouts=tuple(sorted(layouts, key=_order)), refused=tuple(refused))


def axis_sizes(num_gpus: int, *, has_experts: bool) -> Iterator[dict[str, int]]:
    """All axis sizes of a replica on at most ``num_gpus`` GPUs, including invalid ones, so that each gets a reason.

    For ep: the divisors of tp x dp and the smallest non-divisor; for a dense model, at most ep=2 in addition to 1.
    """
    for tp in range(1, num_gpus + 1):
        for dp in range(1, num_gpus // tp + 1):
            for pp in range(1, num_gpus // (tp * dp) + 1):
                for ep in _ep_sizes(tp * dp, has_experts):
                    yield {"tp": tp, "pp": pp, "dp": dp, "ep": ep}


def _ep_sizes(ranks_per_stage: int, has_experts: bool) -> Iterator[int]:
    divisors = [ep for ep in range(1, ranks_per_stage + 1) if ranks_per_stage % ep == 0]
    if not has_experts:
        yield from divisors[:2]
        return
    yield from divisors
    yield from [ep for ep in range(2, ranks_per_stage) if ranks_per_stage % ep][:1]


def _lay_out(sizes: dict[str, int], inputs: PlanInputs) -> Layout | Refusal:
    shape, fleet, workload = inputs.shape, inputs.fleet, inputs.workload
    if refusal := refuse_axes(sizes, shape, fleet):
        return refusal
    topology = Topology(**sizes)
    hosts = place_replica(topology, fleet)
    assert hosts is not None  # refused above
    running = -(-workload.concurrency // hosts.replicas)
    ranks = [
        memory_of_rank(
            shape,
            topology,
            rank,
            format=inputs.format,
            gpu_bytes=fleet.gpu.memory_bytes,
            workload=workload,
            running=running,
            redundant_experts=inputs.redundant_experts,
            draft=inputs.draft,
        )
        for rank in range(topology.size)
    ]
    if refusal := refuse_memory(ranks, fleet, workload):
        return refusal
    kv_tokens = min(rank.kv_tokens(workload.block_tokens) for rank in ranks)
    context = -(-workload.context_tokens // workload.block_tokens) * workload.block_tokens
    at_full_context = min(running, kv_tokens // context * topology.dp)
    speed = fleet.gpu.speed or TYPICAL_SPEED
    return Layout(
        topology=topology,
        placement=hosts,
        ranks=tuple(ranks),
        kv_tokens=kv_tokens * topology.dp,
        running=running,
        at_full_context=at_full_context,
        floors=floors(_replica(inputs, topology, hosts, ranks, speed), workload, at_full_context),
        limits=serving_limits(inputs.format),
    )


def _replica(inputs: PlanInputs, topology: Topology, hosts: Placement, ranks: list[RankMemory], speed: Speed) -> Replica:
    network = inputs.fleet.network
    return Replica(
        shape=inputs.shape,
        format=inputs.format,
        topology=topology,
        ranks=ranks,
        speed=speed,
        stage_link=network if hosts.stage_spans_hosts else speed.link,
        next_stage_link=network if hosts.hosts_per_replica > 1 else speed.link,
    )


def _order(layout: Layout) -> tuple[bool, float, float, int, int]:
    """Sort key, see `ORDER`. Floors are rounded so that differences far below their accuracy do not decide."""
    tokens_per_s, first_token_s = (float(f"{value:.3g}") for value in (layout.total_tokens_per_s, layout.floors.first_token_s))
    return not layout.holds_all, -tokens_per_s, first_token_s, layout.topology.size, -layout.kv_tokens
