"""`manta.v1.AdminService`: information about the server, its load, aborting a request, and draining."""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from google.protobuf.timestamp_pb2 import Timestamp

from cluster.directory import ReplicaRecord
from serve.auth import Authenticator, NoAuthentication
from serve.caller import Scope
from serve.drain_gate import DrainGate
from serve.errors import InvalidRequest
from serve.grpc.auth import caller_of
from serve.grpc.errors import CallContext
from serve.grpc.generated import admin_pb2, admin_pb2_grpc
from serve.grpc.responses import model_message
from serve.grpc.servicer import answer_or_refuse
from serve.version import version


class Fleet(Protocol):
    """The replicas of a model, as a front knows them. `cluster.router.Router` is one."""

    @property
    def replicas(self) -> Sequence[ReplicaRecord]: ...
    def abort(self, request_id: str) -> int:
        """End a request. Returns how many of its choices were running."""
        ...


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    def __init__(
        self,
        gate: DrainGate,
        fleets: Sequence[Fleet],
        *,
        authenticator: Authenticator | None = None,
        drain_notice_s: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``drain_notice_s``: how long whatever balances requests over several fronts takes to learn that this one drains."""
        self._drain_notice_s = drain_notice_s
        self._gate, self._fleets, self._authenticator = gate, fleets, authenticator or NoAuthentication()
        self._started = Timestamp(seconds=int(clock()))

    async def GetServerInfo(self, request: admin_pb2.GetServerInfoRequest, context: CallContext) -> admin_pb2.GetServerInfoResponse:
        async def answer() -> admin_pb2.GetServerInfoResponse:
            caller_of(context, self._authenticator, Scope.ADMIN)
            return admin_pb2.GetServerInfoResponse(
                version=version(),
                started=self._started,
                models=[model_message(facts) for facts in self._gate.models()],
                replicas=[_replica(record) for record in self._records()],
                limits={name: float(value) for name, value in dataclasses.asdict(self._gate.limits).items()},
                draining=self._gate.draining,
            )

        return await answer_or_refuse(answer, admin_pb2.GetServerInfoResponse, context)

    async def GetLoad(self, request: admin_pb2.GetLoadRequest, context: CallContext) -> admin_pb2.GetLoadResponse:
        async def answer() -> admin_pb2.GetLoadResponse:
            caller_of(context, self._authenticator, Scope.ADMIN)
            return admin_pb2.GetLoadResponse(
                replicas=[_load(record) for record in self._records()],
                open_requests=self._gate.num_open,
                draining=self._gate.draining,
            )

        return await answer_or_refuse(answer, admin_pb2.GetLoadResponse, context)

    async def Abort(self, request: admin_pb2.AbortRequest, context: CallContext) -> admin_pb2.AbortResponse:
        async def answer() -> admin_pb2.AbortResponse:
            caller_of(context, self._authenticator, Scope.ADMIN)
            if not request.request_id:
                raise InvalidRequest("request_id is empty: name the request to end", param="request_id")
            return admin_pb2.AbortResponse(choices=sum(fleet.abort(request.request_id) for fleet in self._fleets))

        return await answer_or_refuse(answer, admin_pb2.AbortResponse, context)

    async def Drain(self, request: admin_pb2.DrainRequest, context: CallContext) -> admin_pb2.DrainResponse:
        async def answer() -> admin_pb2.DrainResponse:
            caller_of(context, self._authenticator, Scope.ADMIN)
            if request.undo:
                self._gate.reopen()
            else:
                await asyncio.sleep(self._gate.drain(notice_s=self._drain_notice_s()))
            return admin_pb2.DrainResponse(open_requests=self._gate.num_open)

        return await answer_or_refuse(answer, admin_pb2.DrainResponse, context)

    def _records(self) -> list[ReplicaRecord]:
        return [record for fleet in self._fleets for record in fleet.replicas]


def _replica(record: ReplicaRecord) -> admin_pb2.Replica:
    capacity = record.capacity
    return admin_pb2.Replica(
        id=record.id,
        model=record.model,
        state=_state(record),
        reason=record.reason,
        host=record.host,
        pid=record.pid,
        ranks=[admin_pb2.Rank(rank=place.rank, host=place.host, pid=place.pid) for place in record.ranks],
        restarts=record.num_restarts,
        last_loss=record.last_loss or "",
        kv_blocks=capacity.num_blocks * capacity.num_shards if capacity else 0,
        block_tokens=capacity.block_tokens if capacity else 0,
    )


def _load(record: ReplicaRecord) -> admin_pb2.ReplicaLoad:
    stats = record.stats
    return admin_pb2.ReplicaLoad(
        id=record.id,
        model=record.model,
        state=_state(record),
        running=stats.num_running if stats else 0,
        waiting=stats.num_waiting if stats else 0,
        kv_blocks_used=stats.blocks_used if stats else 0,
        kv_blocks_cached=stats.blocks_cached if stats else 0,
        kv_blocks_free=stats.blocks_free if stats else 0,
    )


def _state(record: ReplicaRecord) -> str:
    return f"REPLICA_STATE_{record.state.name}"
