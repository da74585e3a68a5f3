"""The /metrics page of any front: its own metrics, those of the other fronts, and those of the replicas."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from cluster.directory import ReplicaRecord
from cluster.resume import ResumePolicy
from serve import metric_names as names
from serve.metric_names import Metric
from serve.metrics import Instruments, Snapshot, render, replica_snapshot

METRICS_TOPIC = "metrics"
"""The topic on which fronts publish their snapshots; see `cluster.peer_notes`."""
RESUME_METRICS = {
    "resumes_total": names.RESUMES,
    "resume_refused_total": names.RESUMES_REFUSED,
    "tokens_replayed_total": names.TOKENS_REPLAYED,
}


class OtherFronts(Protocol):
    """`cluster.peer_notes.PeerNotes` is one."""

    async def peers(self) -> Sequence[Snapshot]: ...


class RouterFacts(Protocol):
    """What the page needs of a model's router."""

    @property
    def resumes(self) -> ResumePolicy: ...
    @property
    def replicas(self) -> Iterable[ReplicaRecord]: ...


class FrontFacts(Protocol):
    """What the page says about its own front. `serve.drain_gate.DrainGate` is one."""

    draining: bool

    def ready(self) -> bool: ...


class MetricsPage:
    def __init__(self, instruments: Instruments, routers: Sequence[RouterFacts], others: OtherFronts, front: FrontFacts) -> None:
        """``routers``: one for each model."""
        self._instruments, self._routers, self._others, self._front = instruments, routers, others, front
        self._counted: Counter[tuple[Metric, tuple[tuple[str, str], ...]]] = Counter()

    def own(self) -> Snapshot:
        """The snapshot of this front, which it also publishes for the other fronts."""
        self._instruments.set(names.FRONT_READY, float(self._front.ready()))
        self._instruments.set(names.FRONT_DRAINING, float(self._front.draining))
        self._count_resumes()
        return self._instruments.snapshot()

    def _count_resumes(self) -> None:
        """Adds what the routers have counted since the last time."""
        now: Counter[tuple[Metric, tuple[tuple[str, str], ...]]] = Counter()
        for router in self._routers:
            for sample in router.resumes.counts.samples():
                now[RESUME_METRICS[sample.name], sample.labels] += int(sample.value)
        for (metric, labels), value in now.items():
            self._instruments.count(metric, value - self._counted[metric, labels], **dict(labels))
        self._counted = now

    async def __call__(self, accept: str) -> tuple[bytes, str]:
        """The page, in the format that the Accept header ``accept`` asks for, and its Content-Type."""
        replicas = [replica_snapshot(record) for router in self._routers for record in router.replicas]
        return render([self.own(), *await self._others.peers(), *replicas], accept)
