"""From a checkpoint folder to a rank that takes steps: join the groups, load, measure, warm up."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.config import EngineConfig
from engine.run.runner import Runner
from engine.run.settings import RunnerConfig
from parallel.topology import Topology

StartPhase = Literal["groups", "weights", "memory", "warm_up"]


@dataclass(frozen=True, slots=True)
class StartProgress:
    """How far a rank has come."""

    phase: StartPhase
    done: int
    total: int
    """Of "weights": bytes of this rank's share; of the other phases: 0 when begun and 1 when done, of 1."""


OnProgress = Callable[[StartProgress], None]


@contextmanager
def start_rank(
    *,
    checkpoint_folder: Path,
    topology: Topology,
    rank: int,
    rendezvous: str | None,
    runner_config: RunnerConfig,
    engine_config: EngineConfig,
    on_progress: OnProgress | None = None,
    ranks_on_host: int | None = None,
) -> Iterator[Runner]:
    """One rank, ready to `run` plans; on leaving, its groups are closed and its memory is freed.

    ``rendezvous`` is where the ranks find each other (``tcp://address:port``); a topology of one rank needs none.
    ``ranks_on_host`` is how many ranks share this host's cores and memory (None = all of the topology).
    Every rank of the topology must call this at the same time: they wait for each other.

    Raises:
        CheckpointMismatch: the checkpoint does not fit the model it claims to be.
        NoRoomForKv: not even one sequence of one block fits beside the weights.
    """
    raise NotImplementedError
    yield
