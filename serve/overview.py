"""What a Ray cluster is doing for Manta, as an onlooker sees it: hosts, applications, replicas, and how long clients wait."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import ray._private.state
from ray.serve.context import _get_global_client

from cluster.directory import ReplicaRecord, glimpse
from serve import metric_names as names
from serve.metrics import Snapshot
from serve.metrics_page import METRICS_BOARD
from serve.quantiles import Counts, counts_of


@dataclass(frozen=True, kw_only=True)
class HostView:
    name: str
    ip: str
    alive: bool
    resources: Mapping[str, float]
    """CPU, GPU and what else the host offers."""
    free: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class AppView:
    name: str
    status: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Waits:
    """How long clients of a model waited, all fronts together, since these began."""

    first_token: Counts
    next_token: Counts


@dataclass(frozen=True, kw_only=True)
class Overview:
    hosts: tuple[HostView, ...]
    apps: tuple[AppView, ...]
    replicas: tuple[tuple[str, ReplicaRecord], ...]
    """(application, what a replica says of itself)"""
    waits: Mapping[tuple[str, str], Waits]
    """By application and model."""
    http: str | None = None
    """host:port of Ray Serve's proxies; None where it does not run."""


def look_around() -> Overview:
    """Of the cluster that this process has joined. Changes nothing there."""
    client: Any = _get_global_client(raise_if_no_controller_running=False)
    details: Mapping[str, Any] = client.get_serve_details() if client is not None else {}
    apps = tuple(
        AppView(name=name, status=str(getattr(told["status"], "value", told["status"])), message=told.get("message") or "")
        for name, told in details.get("applications", {}).items()
    )
    replicas: list[tuple[str, ReplicaRecord]] = []
    waits: dict[tuple[str, str], Waits] = {}
    for app in apps:
        records, notes = glimpse(app.name, METRICS_BOARD)
        replicas += [(app.name, record) for record in sorted(records, key=lambda record: (record.model, record.id))]
        for model in {record.model for record in records}:
            waits[app.name, model] = Waits(
                first_token=counts_of(_samples(notes, names.TIME_TO_FIRST_TOKEN.name, model)),
                next_token=counts_of(_samples(notes, names.INTER_TOKEN.name, model)),
            )
    http = details.get("http_options")
    return Overview(
        hosts=tuple(_hosts()), apps=apps, replicas=tuple(replicas), waits=waits, http=f"{http['host']}:{http['port']}" if http else None
    )


def _hosts() -> Iterator[HostView]:
    free = ray._private.state.available_resources_per_node()
    for node in ray.nodes():
        yield HostView(
            name=node["NodeManagerHostname"],
            ip=node["NodeManagerAddress"],
            alive=node["Alive"],
            resources=_countable(node["Resources"]),
            free=_countable(free.get(node["NodeID"], {})),
        )


def _countable(resources: Mapping[str, float]) -> dict[str, float]:
    return {name: resources[name] for name in ("CPU", "GPU") if name in resources}


def _samples(notes: tuple[Snapshot, ...], family: str, model: str) -> Iterator[tuple[float, float]]:
    """(upper bound, how many at most so long) of every front's histogram."""
    for note in notes:
        for name, samples in note:
            for suffix, labels, value in samples if name == family else ():
                told = dict(labels)
                if suffix == "_bucket" and told.get("model_name") == model:
                    yield float(told["le"]), value
