"""Ranks without a model, for what must hold of the processes around it. Token numbers tell a rank what to do."""

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cluster.doctor.facts import Need
from cluster.worker import OnProgress
from engine.executor import Capacity
from engine.load_stats import LoadStats
from engine.plan import SampledTokens, StepPlan, StepResult
from engine.step_handle import CompletedStep, StepHandle
from parallel.topology import Topology

RAISE, SPIN, SLEEP, CRASH, CRASH_AND_RAISE = 666, 667, 668, 669, 670
"""Rank 1 raises while the others wait for it; all ranks wait inside native code with the interpreter locked; all sleep for ever; rank 1
reads where there is no memory while the others wait for it; the same, and the others raise at once that they lost it."""


def hang_in_native_code(seconds: int) -> None:
    """PyDLL keeps the interpreter lock: no Python thread and no signal handler runs."""
    ctypes.PyDLL(None).sleep(seconds)


@dataclass(frozen=True)
class Progress:
    phase: str
    done: int
    total: int
    read: LoadStats | None = None


@dataclass
class FakeRank:
    rank: int
    capacity: Capacity
    topology: Topology

    def begin(self, plan: StepPlan) -> StepHandle:
        return CompletedStep(self.run(plan))

    def run(self, plan: StepPlan) -> StepResult | None:
        tokens = [token for work in plan.works for token in work.tokens]
        if RAISE in tokens and self.rank == 1:
            raise ArithmeticError("rank one cannot count")
        if SPIN in tokens:
            hang_in_native_code(3600)
        if {CRASH, CRASH_AND_RAISE} & set(tokens) and self.rank == 1:
            ctypes.string_at(0)
        if CRASH_AND_RAISE in tokens:
            raise RuntimeError("gloo: Connection closed by peer")
        if {SLEEP, RAISE, CRASH} & set(tokens):  # as a collective waits for a peer that does not come
            time.sleep(3600)
        at = self.topology.coordinates(self.rank)
        if at.tp or at.pp < self.topology.pp - 1:
            return None
        mine = (work for work in plan.works if work.samples and work.shard == at.dp)
        return StepResult(plan.step, tuple(SampledTokens(work.sequence, (work.tokens[-1] + 1,)) for work in mine))


@dataclass(frozen=True, kw_only=True)
class FakeRankLauncher:
    topology: Topology
    fails_to_start: int | None = None
    """This rank raises while it starts."""
    need: Need = field(default_factory=Need)
    missing: str | None = None
    """What a look at the host finds missing."""

    def check_host(self) -> None:
        if self.missing:
            raise FileNotFoundError(self.missing)

    @contextmanager
    def start(self, *, rank: int, rendezvous: str | None, ranks_on_host: int, on_progress: OnProgress) -> Iterator[FakeRank]:
        on_progress(Progress("weights", 1, 2))
        if rank == self.fails_to_start:
            raise FileNotFoundError("no such shard")
        assert (rendezvous is not None) == (self.topology.size > 1)
        assert os.environ
        yield FakeRank(rank, Capacity(num_blocks=64 + rank, block_tokens=16, max_context_tokens=1024), self.topology)
