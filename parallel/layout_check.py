"""Checks, before anything is started, whether a model can be distributed over a topology. Pure arithmetic."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from parallel.topology import Topology

ProblemReason = Literal["heads", "layers", "dense", "experts"]


class Experts(Protocol):
    @property
    def num_experts(self) -> int: ...


class Shape(Protocol):
    """The properties of a model that limit its topologies; `model.config.ModelConfig` implements it."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def moe(self) -> Experts | None: ...


@dataclass(frozen=True)
class LayoutProblem:
    """One reason why it is impossible, in a sentence that says what to do instead."""

    reason: ProblemReason
    sentence: str


class InvalidLayout(ValueError):
    """The model cannot be distributed over this topology; the message lists every reason."""


def layout_problems(topology: Topology, shape: Shape) -> tuple[LayoutProblem, ...]:
    """Every reason why a model of this shape cannot be distributed over ``topology``; empty if it can."""
    return tuple(_misfits(topology, shape))


def check_layout(topology: Topology, shape: Shape) -> None:
    """
    Raises:
        InvalidLayout: there are `layout_problems`.
    """
    if found := layout_problems(topology, shape):
        raise InvalidLayout("; ".join(misfit.sentence for misfit in found))


def _misfits(topology: Topology, shape: Shape) -> Iterator[LayoutProblem]:
    heads, layers = shape.num_heads, shape.num_layers
    if topology.tp > heads:
        yield LayoutProblem("heads", f"{heads} query heads cannot be shared over tp={topology.tp} ranks; use at most {heads}")
    if topology.pp > layers:
        yield LayoutProblem("layers", f"{layers} layers cannot fill {topology.pp} stages; use pp={layers} at most")
    if shape.moe is None:
        if topology.ep > 1:
            yield LayoutProblem("dense", f"this model has no routed experts to spread over ep={topology.ep}; use ep=1")
    elif topology.ep > (most := shape.moe.num_experts):
        yield LayoutProblem("experts", f"{most} routed experts cannot be spread over ep={topology.ep} positions; use ep={most} at most")
