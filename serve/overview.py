"""Collect the state of a Ray cluster for `manta status`: hosts, applications, fronts, replicas and latencies. Read-only."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
import ray._private.state
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from cluster.directory import DirectoryUnavailable, ReplicaRecord, apps_with_directories, read_directory
from cluster.peer_liveness import PeerStatus, probe_peer
from serve import metric_names as names
from serve.metrics import Snapshot
from serve.metrics_page import METRICS_TOPIC
from serve.quantiles import Counts, merge_counts

ANSWER_S = 5.0
"""Timeout for Ray Serve's controller."""
PROBE_TIMEOUT_S = 1.0
"""Timeout for a connection to a host's Ray."""
MAX_PROBES = 64
"""Maximum concurrent probes."""


@dataclass(frozen=True, kw_only=True)
class HostView:
    name: str
    ip: str
    alive: bool
    resources: Mapping[str, float]
    """Total resources of the host: CPU and GPU."""
    free: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class AppView:
    name: str
    status: str
    message: str


@dataclass(frozen=True, kw_only=True)
class FrontView:
    id: str
    ready: bool
    """Whether it accepts requests, and has replicas for them."""
    draining: bool
    """Whether it refuses new requests."""

    @property
    def state(self) -> str:
        """``"ready"``, ``"not ready"`` or ``"draining"``."""
        return "draining" if self.draining else "ready" if self.ready else "not ready"


@dataclass(frozen=True, kw_only=True)
class LatencyCounts:
    """Latency histograms of a model, summed over all fronts since they started."""

    first_token: Counts
    next_token: Counts


@dataclass(frozen=True, kw_only=True)
class Overview:
    hosts: tuple[HostView, ...]
    apps: tuple[AppView, ...]
    replicas: tuple[tuple[str, ReplicaRecord], ...]
    """(application, the replica's own report)"""
    waits: Mapping[tuple[str, str], LatencyCounts]
    """By application and model."""
    fronts: tuple[tuple[str, FrontView], ...] = ()
    """(application, the front's own report)"""
    http: str | None = None
    """host:port of Ray Serve's proxies; None if it does not run."""
    missing: tuple[str, ...] = ()
    """Messages about hosts, replicas and Ray processes that are missing or do not respond."""

    @property
    def complete(self) -> bool:
        """Whether everything that should serve is there and ready."""
        are_ready = (*(front.ready for _, front in self.fronts), *(record.ready for _, record in self.replicas))
        return not self.missing and all(app.status == "RUNNING" for app in self.apps) and all(are_ready)


def collect_overview() -> Overview:
    """The state of the cluster that this process is connected to. All waits have short timeouts; what does not respond is listed as
    missing."""
    missing: list[str] = []
    try:
        hosts = tuple(_hosts(missing))
    except (ray.exceptions.RayError, RuntimeError) as error:
        missing.append(f"Ray's head: {error}")
        return Overview(hosts=(), apps=(), replicas=(), waits={}, missing=tuple(missing))
    details = _details(missing)
    apps = tuple(
        AppView(name=name, status=str(getattr(info["status"], "value", info["status"])), message=info.get("message") or "")
        for name, info in details.get("applications", {}).items()
    )
    replicas: list[tuple[str, ReplicaRecord]] = []
    fronts: list[tuple[str, FrontView]] = []
    waits: dict[tuple[str, str], LatencyCounts] = {}
    for app in [app.name for app in apps] or (apps_with_directories() if missing else ()):
        try:
            records, notes = read_directory(app, METRICS_TOPIC)
        except DirectoryUnavailable as error:
            missing.append(f"the directory of {app}'s replicas: {error}")
            continue
        replicas += [(app, record) for record in sorted(records, key=lambda record: (record.model, record.id))]
        known = details.get("applications", {}).get(app, {})
        missing += _unheard(known, {record.id for record in records}, hosts)
        fronts += [(app, front) for front in _fronts(known, notes)]
        for model in {record.model for record in records}:
            waits[app, model] = LatencyCounts(
                first_token=merge_counts(_samples(notes, names.TIME_TO_FIRST_TOKEN.name, model)),
                next_token=merge_counts(_samples(notes, names.INTER_TOKEN.name, model)),
            )
    http = details.get("http_options")
    return Overview(
        hosts=hosts,
        apps=apps,
        replicas=tuple(replicas),
        fronts=tuple(fronts),
        waits=waits,
        http=f"{http['host']}:{http['port']}" if http else None,
        missing=tuple(missing),
    )


def _details(missing: list[str]) -> Mapping[str, Any]:
    """Details from Ray Serve's controller; empty if Ray Serve does not run."""
    try:
        controller: Any = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return {}
    except ray.exceptions.RayError as error:
        missing.append(f"Ray's head: {error}")
        return {}
    try:
        details: Mapping[str, Any] = ray.get(controller.get_serve_instance_details.remote(), timeout=ANSWER_S)
    except ray.exceptions.GetTimeoutError:
        missing.append(f"Ray Serve's controller: no answer within {ANSWER_S:g} s")
    except ray.exceptions.RayError as error:
        missing.append(f"Ray Serve's controller: {error}")
    else:
        return details
    return {}


def _unheard(app: Mapping[str, Any], reported: set[str], hosts: Sequence[HostView]) -> Iterator[str]:
    """Messages about deployments with fewer running replicas than their target, and about running replicas that have not reported."""
    host_of = {host.ip: host.name for host in hosts}
    for deployment, details in app.get("deployments", {}).items():
        running = [one for one in details.get("replicas", ()) if str(getattr(one["state"], "value", one["state"])) == "RUNNING"]
        scales_up = str(getattr(details.get("status"), "value", details.get("status"))) == "UPSCALING"
        if len(running) < (wanted := details.get("target_num_replicas") or 0) and not scales_up:
            yield f"{deployment}: {len(running)} of {wanted} replicas run"
        for replica in running if deployment.startswith("EngineDeployment") else ():
            if replica["replica_id"] not in reported:
                at = replica.get("node_ip")
                yield f"replica {replica['replica_id']} of {deployment} on host {host_of.get(at, at)}: it has not reported of late"


def _fronts(app: Mapping[str, Any], notes: Sequence[Snapshot]) -> list[FrontView]:
    """The fronts that have published their metrics of late, by id. One that has ended is left out where Ray Serve says so (``app``): its
    note stays for some seconds."""
    running = {replica["replica_id"] for details in app.get("deployments", {}).values() for replica in details.get("replicas", ())}
    ready, draining = (_by_front(notes, metric.name) for metric in (names.FRONT_READY, names.FRONT_DRAINING))
    return [
        FrontView(id=front, ready=bool(value), draining=bool(draining.get(front)))  # one of an earlier version does not say that it drains
        for front, value in sorted(ready.items())
        if not app or front in running
    ]


def _by_front(notes: Sequence[Snapshot], family: str) -> dict[str, float]:
    """A gauge's value by front."""
    return {dict(labels)["front"]: value for note in notes for name, samples in note if name == family for _, labels, value in samples}


def _hosts(missing: list[str]) -> Iterator[HostView]:
    free = ray._private.state.available_resources_per_node()
    nodes = ray.nodes()
    with ThreadPoolExecutor(MAX_PROBES) as knocking:
        far_ends = list(knocking.map(_far_end, nodes))
    for node, far_end in zip(nodes, far_ends, strict=True):
        if far_end is PeerStatus.HOST_UNREACHABLE:
            missing.append(f"host {node['NodeManagerHostname']} ({node['NodeManagerAddress']}): it cannot be reached from here")
        yield HostView(
            name=node["NodeManagerHostname"],
            ip=node["NodeManagerAddress"],
            alive=node["Alive"],
            resources=_countable(node["Resources"]),
            free=_countable(free.get(node["NodeID"], {})),
        )


def _far_end(node: Mapping[str, Any]) -> PeerStatus | None:
    """Ray takes a minute to find out that a host is lost."""
    return probe_peer(f"tcp://{node['NodeManagerAddress']}:{node['NodeManagerPort']}", PROBE_TIMEOUT_S) if node["Alive"] else None


def _countable(resources: Mapping[str, float]) -> dict[str, float]:
    return {name: resources[name] for name in ("CPU", "GPU") if name in resources}


def _samples(notes: tuple[Snapshot, ...], family: str, model: str) -> Iterator[tuple[float, float]]:
    """(upper bound, cumulative count) of every bucket of every front's histogram."""
    for note in notes:
        for name, samples in note:
            for suffix, labels, value in samples if name == family else ():
                label_values = dict(labels)
                if suffix == "_bucket" and label_values.get("model_name") == model:
                    yield float(label_values["le"]), value
