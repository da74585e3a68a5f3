"""What any front answers on /metrics: its own measures, those of the other fronts, and what the replicas say of themselves."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from cluster.directory import ReplicaRecord
from serve import metric_names as names
from serve.metrics import Instruments, Snapshot, render, replica_snapshot


class OtherFronts(Protocol):
    """`cluster.board.Board` is one."""

    async def others(self) -> Sequence[Snapshot]: ...


class SourceFacts(Protocol):
    """What the page asks of a model's router."""

    num_resumes: int

    @property
    def replicas(self) -> Iterable[ReplicaRecord]: ...
    def ready(self) -> bool: ...


class MetricsPage:
    def __init__(self, instruments: Instruments, sources: Sequence[SourceFacts], others: OtherFronts) -> None:
        """``sources``: one for each model."""
        self._instruments, self._sources, self._others = instruments, sources, others
        self._num_resumes = 0

    def own(self) -> Snapshot:
        """This front's part, as the other fronts are told it."""
        self._instruments.show(names.FRONT_READY, float(all(source.ready() for source in self._sources)))
        num_resumes = sum(source.num_resumes for source in self._sources)
        self._instruments.count(names.RESUMES, num_resumes - self._num_resumes)
        self._num_resumes = num_resumes
        return self._instruments.snapshot()

    async def __call__(self, accept: str) -> tuple[bytes, str]:
        """The page, in the format that the Accept header asks for, and its Content-Type."""
        replicas = [replica_snapshot(record) for source in self._sources for record in source.replicas]
        return render([self.own(), *await self._others.others(), *replicas], accept)
