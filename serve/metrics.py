"""The instruments of one front, and rendering of the /metrics page. Only this module imports prometheus_client.

Fronts exchange `Snapshot`s, which are plain tuples so that they can be sent anywhere.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import choose_encoder

from cluster.directory import ReplicaRecord
from engine.stats import EngineStats
from serve import metric_names as names
from serve.metric_names import METRICS, Kind, Metric

Sample: TypeAlias = tuple[str, tuple[tuple[str, str], ...], float]
"""(what follows the family's name, labels, value)"""
Snapshot: TypeAlias = tuple[tuple[str, tuple[Sample, ...]], ...]
"""(name of a `Metric`, its samples)"""

BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}


class Instruments:
    """The counters, gauges and histograms of one front. Not thread-safe."""

    def __init__(self, front: str) -> None:
        self._front = front
        self._registry = CollectorRegistry(auto_describe=False)
        self._instruments = {metric: self._make(metric) for metric in METRICS if "front" in metric.labels}

    def count(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        instrument = self._instruments[metric]
        assert isinstance(instrument, Counter)
        instrument.labels(front=self._front, **labels).inc(amount)

    def add(self, metric: Metric, amount: float, **labels: str) -> None:
        """Add to a gauge; the amount may be negative."""
        instrument = self._instruments[metric]
        assert isinstance(instrument, Gauge)
        instrument.labels(front=self._front, **labels).inc(amount)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Set a gauge."""
        instrument = self._instruments[metric]
        assert isinstance(instrument, Gauge)
        instrument.labels(front=self._front, **labels).set(value)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        instrument = self._instruments[metric]
        assert isinstance(instrument, Histogram)
        instrument.labels(front=self._front, **labels).observe(value)

    def snapshot(self) -> Snapshot:
        return tuple((family.name, tuple(_samples(family))) for family in self._registry.collect())

    def _make(self, metric: Metric) -> Counter | Gauge | Histogram:
        if metric.kind is Kind.HISTOGRAM:
            return Histogram(metric.name, metric.description, metric.labels, registry=self._registry, buckets=metric.buckets)
        kind = Counter if metric.kind is Kind.COUNTER else Gauge
        return kind(metric.name, metric.description, metric.labels, registry=self._registry)


def _samples(family: Family) -> Iterator[Sample]:
    for sample in family.samples:
        suffix = sample.name.removeprefix(family.name)
        if suffix != "_created":  # the time at which each series was created
            yield suffix, tuple(sample.labels.items()), float(sample.value)


def replica_snapshot(record: ReplicaRecord) -> Snapshot:
    """What a replica reports about itself. Before its engine runs, only whether it is ready."""
    labels = (("model_name", record.model), ("replica", record.id))
    values: list[tuple[Metric, tuple[tuple[str, str], ...], float]] = [(names.REPLICA_READY, (), float(record.ready))]
    if record.stats is not None:
        values += [(metric, (), value) for metric, value in _engine_values(record.stats).items()]
        values += [(names.KV_BLOCKS, (("state", state),), value) for state, value in _blocks(record.stats).items()]
    if (capacity := record.capacity) is not None:
        shape = {
            "block_size": capacity.block_tokens,
            "num_gpu_blocks": capacity.num_blocks * capacity.num_shards,
            "num_shards": capacity.num_shards,
            "max_model_len": capacity.max_context_tokens,
        }
        values.append((names.CACHE_CONFIG, tuple((name, str(value)) for name, value in shape.items()), 1.0))
    return tuple(
        (metric.name, (("_total" if metric.kind is Kind.COUNTER else "", (*labels, *own), float(value)),)) for metric, own, value in values
    )


def _engine_values(stats: EngineStats) -> dict[Metric, float]:
    return {
        names.RUNNING: stats.num_running,
        names.WAITING: stats.num_waiting,
        names.KV_USED: stats.kv_used,
        names.PREFIX_QUERIES: stats.prefix_queried_tokens,
        names.PREFIX_HITS: stats.prefix_hit_tokens,
        names.PREEMPTIONS: stats.num_preemptions,
        names.STEPS: stats.num_steps,
        names.STEP_SECONDS: stats.step_s,
        names.COMPUTED_TOKENS: stats.computed_tokens,
        names.SAMPLED_TOKENS: stats.sampled_tokens,
        names.DRAFTED_TOKENS: stats.drafted_tokens,
        names.ACCEPTED_TOKENS: stats.accepted_tokens,
        names.WORKER_LOSSES: stats.num_losses,
        names.EXPERT_MOVES: stats.expert_moves,
        names.EXPERT_IMBALANCE: stats.expert_imbalance,
    }


def _blocks(stats: EngineStats) -> dict[str, int]:
    return {"used": stats.blocks_used, "cached": stats.blocks_cached, "free": stats.blocks_free}


def render(snapshots: Iterable[Snapshot], accept: str = "") -> tuple[bytes, str]:
    """The page and its Content-Type: OpenMetrics if ``accept`` asks for it, else the Prometheus text format."""
    encode, content_type = choose_encoder(accept)
    return encode(_Page(list(snapshots))), content_type


class _Page:
    """A collector of every family with the samples of all snapshots, and once more under its alias."""

    def __init__(self, snapshots: Sequence[Snapshot]) -> None:
        self._samples: dict[str, list[Sample]] = {metric.name: [] for metric in METRICS}
        for snapshot in snapshots:
            for name, samples in snapshot:
                if name in self._samples:  # a front of another version may have other metrics
                    self._samples[name] += samples

    def collect(self) -> Iterator[Family]:
        for name, samples in self._samples.items():
            metric = BY_NAME[name]
            for family_name in filter(None, (metric.name, metric.alias)):
                family = Family(family_name, metric.description, metric.kind.value)
                for suffix, labels, value in samples:
                    family.add_sample(family_name + suffix, dict(labels), value)
                yield family
