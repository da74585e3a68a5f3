"""Ranks and their coordinates on the parallel axes. Pure arithmetic: no torch, no processes."""

from dataclasses import dataclass
from typing import Literal

TopologyAxis = Literal["tp", "dp", "pp", "ep", "expert_tp", "stage", "world"]


class InvalidTopology(ValueError):
    """The axis sizes cannot form a replica."""


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Where one rank stands on every axis."""

    tp: int
    dp: int
    pp: int
    ep: int
    expert_tp: int


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The shape of one replica: ``pp`` stages, each of ``dp x tp`` ranks.

    Ranks are numbered with ``tp`` fastest, then ``dp``, then ``pp``. Routed experts see the same ranks of a stage a
    second way: ``ep x expert_tp`` (``expert_tp`` fastest), so ``ep`` must divide ``tp * dp``.

    tp=2, dp=2, ep=2:   rank        0 1 2 3
                        tp          0 1 0 1      attention, dense MLP, shared expert, vocabulary
                        dp          0 0 1 1      which of the replica's sequences
                        ep          0 0 1 1      which routed experts
                        expert_tp   0 1 0 1      which part of each of them
    """

    tp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "dp", "pp", "ep"):
            if getattr(self, name) < 1:
                raise InvalidTopology(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.ranks_per_stage % self.ep:
            raise InvalidTopology(
                f"ep={self.ep} does not divide the {self.ranks_per_stage} ranks of a stage (tp={self.tp} x dp={self.dp}); choose a divisor"
            )

    @property
    def ranks_per_stage(self) -> int:
        return self.tp * self.dp

    @property
    def expert_tp(self) -> int:
        """Ranks that share one routed expert."""
        return self.ranks_per_stage // self.ep

    @property
    def size(self) -> int:
        """Ranks of one replica."""
        return self.pp * self.ranks_per_stage

    def coordinates(self, rank: int) -> Coordinates:
        if not 0 <= rank < self.size:
            raise InvalidTopology(f"rank {rank} is outside this topology of {self.size} ranks")
        pp, within_stage = divmod(rank, self.ranks_per_stage)
        dp, tp = divmod(within_stage, self.tp)
        ep, expert_tp = divmod(within_stage, self.expert_tp)
        return Coordinates(tp=tp, dp=dp, pp=pp, ep=ep, expert_tp=expert_tp)

    def peers(self, rank: int, axis: TopologyAxis) -> tuple[int, ...]:
        """The ranks, ascending, that differ from ``rank`` along ``axis`` only (``rank`` included).

        ``stage`` is all ranks of the same pipeline stage, ``world`` all ranks of the replica.
        """
        first_of_stage = rank - rank % self.ranks_per_stage
        stage = range(first_of_stage, first_of_stage + self.ranks_per_stage)
        here = self.coordinates(rank)
        match axis:
            case "world":
                return tuple(range(self.size))
            case "stage":
                return tuple(stage)
            case "pp":
                return tuple(range(rank % self.ranks_per_stage, self.size, self.ranks_per_stage))
            case "tp":
                return tuple(r for r in stage if self.coordinates(r).dp == here.dp)
            case "dp":
                return tuple(r for r in stage if self.coordinates(r).tp == here.tp)
            case "ep":
                return tuple(r for r in stage if self.coordinates(r).expert_tp == here.expert_tp)
            case "expert_tp":
                return tuple(r for r in stage if self.coordinates(r).ep == here.ep)

    def __str__(self) -> str:
        axes = (f"{name} {getattr(self, name)}" for name in ("tp", "dp", "pp", "ep") if getattr(self, name) > 1)
        return " x ".join(axes) or "one rank"
