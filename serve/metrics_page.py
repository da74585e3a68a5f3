"""What any front answers on /metrics: its own measures, those of the other fronts, and what the replicas say of themselves."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from cluster.directory import ReplicaRecord
from cluster.resume import ResumePolicy
from serve import metric_names as names
from serve.metric_names import Metric
from serve.metrics import Instruments, Snapshot, render, replica_snapshot

METRICS_BOARD = "metrics"
"""Where fronts pin their snapshots; see `cluster.peer_notes`."""
RESUME_METRICS = {
    "resumes_total": names.RESUMES,
    "resume_refused_total": names.RESUMES_REFUSED,
    "tokens_replayed_total": names.TOKENS_REPLAYED,
}


class OtherFronts(Protocol):
    """`cluster.peer_notes.PeerNotes` is one."""

    async def peers(self) -> Sequence[Snapshot]: ...


class SourceFacts(Protocol):
    """What the page asks of a model's router."""

    @property
    def resumes(self) -> ResumePolicy: ...
    @property
    def replicas(self) -> Iterable[ReplicaRecord]: ...
    def ready(self) -> bool: ...


class MetricsPage:
    def __init__(self, instruments: Instruments, sources: Sequence[SourceFacts], others: OtherFronts) -> None:
        """``sources``: one for each model."""
        self._instruments, self._sources, self._others = instruments, sources, others
        self._told: Counter[tuple[Metric, tuple[tuple[str, str], ...]]] = Counter()

    def own(self) -> Snapshot:
        """This front's part, as the other fronts are told it."""
        self._instruments.show(names.FRONT_READY, float(all(source.ready() for source in self._sources)))
        self._tell_resumes()
        return self._instruments.snapshot()

    def _tell_resumes(self) -> None:
        now: Counter[tuple[Metric, tuple[tuple[str, str], ...]]] = Counter()
        for source in self._sources:
            for sample in source.resumes.counts.samples():
                now[RESUME_METRICS[sample.name], sample.labels] += int(sample.value)
        for (metric, labels), value in now.items():
            self._instruments.count(metric, value - self._told[metric, labels], **dict(labels))
        self._told = now

    async def __call__(self, accept: str) -> tuple[bytes, str]:
        """The page, in the format that the Accept header asks for, and its Content-Type."""
        replicas = [replica_snapshot(record) for source in self._sources for record in source.replicas]
        return render([self.own(), *await self._others.peers(), *replicas], accept)
