"""Reasons why a layout is invalid: one sentence each, with what to do instead."""

from dataclasses import dataclass
from typing import Literal

from engine.counted import counted
from parallel.layout_check import layout_problems
from parallel.topology import InvalidTopology, Topology
from serve.planning.hardware import Fleet
from serve.planning.memory import GIB, RankMemory, Workload
from serve.planning.placement import place_replica
from serve.planning.shape import ModelShape

Reason = Literal["axes", "heads", "layers", "experts", "dense", "host", "weights", "context"]


@dataclass(frozen=True)
class Refusal:
    reason: Reason
    sentence: str


def refuse_axes(sizes: dict[str, int], shape: ModelShape, fleet: Fleet) -> Refusal | None:
    """Why the axis sizes are invalid for this model and fleet, regardless of memory; None if they are valid."""
    try:
        topology = Topology(**sizes)
    except InvalidTopology as error:
        return Refusal("axes", str(error))
    return _refuse_for_model(topology, shape) or _refuse_for_hosts(topology, fleet)


def _refuse_for_model(topology: Topology, shape: ModelShape) -> Refusal | None:
    if found := layout_problems(topology, shape):
        return Refusal(found[0].reason, found[0].sentence)
    if shape.moe is None and topology.dp > 1:  # it could be served, but is never useful
        return Refusal(
            "dense", f"dp={topology.dp} inside a replica would hold a dense model {topology.dp} times without benefit; use more replicas"
        )
    return None


def _refuse_for_hosts(topology: Topology, fleet: Fleet) -> Refusal | None:
    if place_replica(topology, fleet) is not None:
        return None
    gpus = counted(fleet.gpus_per_host, "GPU")
    if topology.tp > fleet.gpus_per_host:
        return Refusal(
            "host",
            f"tp={topology.tp} does not fit on a host of {gpus}; use at most tp={fleet.gpus_per_host}, "
            "and pipeline stages (pp) across hosts",
        )
    return Refusal(
        "host",
        f"{topology} cannot be placed evenly on hosts of {gpus}, by whole stages or by whole tp groups of a stage; "
        f"use pp x dp x tp so that each of at most {counted(fleet.hosts, 'host')} holds the same",
    )


def refuse_memory(ranks: list[RankMemory], fleet: Fleet, workload: Workload) -> Refusal | None:
    """Why memory is insufficient: the weights do not fit, or there is no room for one sequence; None if it suffices."""
    fullest = min(ranks, key=lambda rank: rank.kv_budget_bytes)
    if fullest.kv_budget_bytes <= 0:
        return Refusal(
            "weights",
            f"a rank needs {_gib(fullest.held_weights_bytes)} for weights and {_gib(fullest.activation_bytes + fullest.reserve_bytes)} for "
            f"activations and reserve, more than the {_gib(fullest.gpu_bytes)} of a GPU ({fleet.gpu.name}); use more ranks (tp, pp or ep), "
            "a smaller --dtype or fewer --max-step-tokens",
        )
    room = min(rank.kv_tokens(workload.block_tokens) for rank in ranks)
    if room < workload.context_tokens:
        return Refusal(
            "context",
            f"besides the weights there is room for {room:,} tokens of KV, less than one context of {workload.context_tokens:,}; "
            f"use more ranks, a smaller --dtype{f' or --context {room}' if room >= 1 else ''}",
        )
    return None


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
