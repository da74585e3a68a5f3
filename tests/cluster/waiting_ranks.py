"""Ranks of a pipeline that compute a part of a long prompt only while the other stages are at other parts. Light to import: every
worker process does, before it is examined."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cluster.doctor.facts import Need
from cluster.worker import ModelRankLauncher, OnProgress, Rank
from engine.executor import Capacity
from engine.plan import StepPlan, StepResult
from engine.step_handle import CompletedStep, StepHandle
from parallel.topology import Topology

PART = 128
"""Tokens, one of the prompt's `NUM_PARTS`."""
NUM_PARTS = 7
WAIT_S = 60.0


@dataclass
class WaitsForTheOthers:
    """A rank that computes no part of the prompt before every earlier stage has begun the part that it should be at by then:
    stage 2 waits with part 0 until stage 1 has begun part 1 and stage 0 part 2. If no more than one is under way, it waits in vain."""

    rank: Rank
    stage: int
    begun: Path

    @property
    def capacity(self) -> Capacity:
        return self.rank.capacity

    def begin(self, plan: StepPlan) -> StepHandle:
        return CompletedStep(self.run(plan))

    def run(self, plan: StepPlan) -> StepResult | None:
        for part in [work.start // PART for work in plan.works if len(work.tokens) == PART]:
            self._place(self.stage, part).touch()
            for earlier in range(self.stage):
                if (ahead := part + self.stage - earlier) < NUM_PARTS:
                    self._await(earlier, ahead)
        return self.rank.begin(plan).result()

    def _await(self, stage: int, part: int) -> None:
        deadline = time.monotonic() + WAIT_S
        while not self._place(stage, part).exists():
            assert time.monotonic() < deadline, f"stage {stage} has not begun part {part} while stage {self.stage} was to compute"
            time.sleep(0.005)

    def _place(self, stage: int, part: int) -> Path:
        return self.begun / f"stage-{stage}-part-{part}"


@dataclass(frozen=True, kw_only=True)
class StagesThatWait:
    launcher: ModelRankLauncher
    begun: Path
    need: Need = field(default_factory=Need)

    @property
    def topology(self) -> Topology:
        return self.launcher.topology

    def check_host(self) -> None:
        self.launcher.check_host()

    @contextmanager
    def start(self, *, rank: int, rendezvous: str | None, ranks_on_host: int, on_progress: OnProgress) -> Iterator[Rank]:
        started = self.launcher.start(rank=rank, rendezvous=rendezvous, ranks_on_host=ranks_on_host, on_progress=on_progress)
        with started as inner:
            yield WaitsForTheOthers(inner, self.topology.coordinates(rank).pp, self.begun)
