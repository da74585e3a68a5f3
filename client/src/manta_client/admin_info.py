"""The results of `client.admin`, and their conversion from protobuf."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone

from . import convert
from ._generated import admin_pb2
from .answers import Model


@dataclass(frozen=True, kw_only=True)
class Rank:
    """The process that holds one device of a replica."""

    rank: int
    host: str
    pid: int


@dataclass(frozen=True, kw_only=True)
class Replica:
    """One copy of a model."""

    id: str
    model: str
    state: str
    """"starting", "ready", "recovering", "draining" or "failed"."""
    reason: str
    """Why it is not ready, if it is not."""
    host: str
    pid: int
    ranks: tuple[Rank, ...]
    restarts: int
    """How often its ranks have been restarted."""
    last_loss: str
    """What caused the last restart."""
    kv_blocks: int
    """Of all its shards together; 0 until its size is known."""
    block_tokens: int


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """Information about the server."""

    version: str
    started: datetime
    models: tuple[Model, ...]
    replicas: tuple[Replica, ...]
    limits: Mapping[str, float]
    """Every limit on requests, by its name in the configuration."""
    draining: bool
    raw: admin_pb2.GetServerInfoResponse = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class ReplicaLoad:
    """The load of a replica, as last reported."""

    id: str
    model: str
    state: str
    running: int
    """Choices that are being computed."""
    waiting: int
    """Choices that wait for KV blocks."""
    kv_blocks_used: int
    kv_blocks_cached: int
    """Hold cached prefixes, and are reused when they are needed."""
    kv_blocks_free: int


@dataclass(frozen=True, kw_only=True)
class Load:
    """The load of the server."""

    replicas: tuple[ReplicaLoad, ...]
    open_requests: int
    """Requests that the front is answering, over HTTP and gRPC."""
    draining: bool
    raw: admin_pb2.GetLoadResponse = field(repr=False, compare=False)


def server_info(response: admin_pb2.GetServerInfoResponse) -> ServerInfo:
    return ServerInfo(
        version=response.version,
        started=response.started.ToDatetime(tzinfo=timezone.utc),
        models=tuple(convert.model(model) for model in response.models),
        replicas=tuple(_replica(replica) for replica in response.replicas),
        limits=dict(response.limits),
        draining=response.draining,
        raw=response,
    )


def load(response: admin_pb2.GetLoadResponse) -> Load:
    replicas = tuple(
        ReplicaLoad(
            id=replica.id,
            model=replica.model,
            state=_state(replica.state),
            running=replica.running,
            waiting=replica.waiting,
            kv_blocks_used=replica.kv_blocks_used,
            kv_blocks_cached=replica.kv_blocks_cached,
            kv_blocks_free=replica.kv_blocks_free,
        )
        for replica in response.replicas
    )
    return Load(replicas=replicas, open_requests=response.open_requests, draining=response.draining, raw=response)


def _replica(replica: admin_pb2.Replica) -> Replica:
    return Replica(
        id=replica.id,
        model=replica.model,
        state=_state(replica.state),
        reason=replica.reason,
        host=replica.host,
        pid=replica.pid,
        ranks=tuple(Rank(rank=one.rank, host=one.host, pid=one.pid) for one in replica.ranks),
        restarts=replica.restarts,
        last_loss=replica.last_loss,
        kv_blocks=replica.kv_blocks,
        block_tokens=replica.block_tokens,
    )


def _state(value: int) -> str:
    """REPLICA_STATE_READY becomes "ready". A state newer than this library becomes its number."""
    known = admin_pb2.ReplicaState.DESCRIPTOR.values_by_number.get(value)
    return known.name.removeprefix("REPLICA_STATE_").lower() if known else str(value)
