"""A world without processes: replicas whose token i is a hash of (prompt, i), and that can be lost at any token."""

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from cluster.channel import Address
from cluster.directory import ReplicaRecord
from cluster.health import State
from cluster.replica_link import LinkLost
from engine.plan import TokenEvent
from engine.request import Request


def token(prompt: tuple[int, ...], position: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr((prompt, position)).encode(), digest_size=2).digest())


def answer(request: Request) -> list[int]:
    return [token(request.prompt, position) for position in range(request.sampling.max_tokens)]


def record(id: str, *, node: str = "n", ipc: str | None = None) -> ReplicaRecord:
    return ReplicaRecord(id=id, model="m", state=State.READY, address=Address(node=node, ipc=ipc or f"ipc:///{id}"))


@dataclass
class FakeLink:
    """A replica that answers at once, and is lost before the tokens named in `lost_at` (one for each attempt it sees)."""

    record: ReplicaRecord
    ready: bool = True
    lost: bool = False
    ranks_lost: bool = False
    lost_host: str | None = None
    released: int = 0
    load: int = 0
    lost_at: list[int] = field(default_factory=list)
    error_at: dict[int, str] = field(default_factory=dict)
    """Position -> error kind that the engine reports there."""
    wrong: dict[int, TokenEvent] = field(default_factory=dict)
    """Position -> an event that is slipped in before the right one."""
    seen: list[Request] = field(default_factory=list)
    cancelled: list[Request] = field(default_factory=list)
    closed: bool = False
    num_cached: int = 0
    stays: bool = True
    """Whether it is back at once after a loss."""

    @property
    def id(self) -> str:
        return self.record.id

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        self.seen.append(request)
        dies_at = self.lost_at.pop(0) if self.lost_at else None
        ended = False
        try:
            for position in range(len(request.committed), request.sampling.max_tokens):
                await asyncio.sleep(0)
                if position == dies_at:
                    ended = True
                    self.ready = self.stays
                    raise LinkLost(self.id, "killed", reason="disconnected", died=self.lost_host is None, host=self.lost_host)
                if position in self.wrong:
                    yield self.wrong.pop(position)
                if position in self.error_at:
                    ended = True
                    yield self.event(request, position, (), "error", self.error_at.pop(position))
                    return
                last = position == request.sampling.max_tokens - 1
                ended = last
                yield self.event(request, position, (token(request.prompt, position),), "length" if last else None, None)
        finally:
            if not ended:
                self.cancelled.append(request)

    def event(self, request: Request, offset: int, tokens: tuple[int, ...], finish: str | None, error: str | None) -> TokenEvent:
        return TokenEvent(
            request_id=request.id,
            choice=request.choice,
            attempt=request.attempt,
            offset=offset,
            tokens=tokens,
            num_cached=self.num_cached,
            finish_reason=finish,  # type: ignore[arg-type]
            error_kind=error,
            error_message=error and "said the engine",
        )

    def release(self) -> None:
        self.released += 1

    async def close(self) -> None:
        self.closed = True


class FakeReplicas:
    def __init__(self, *records: ReplicaRecord) -> None:
        self.records = records

    @property
    def known(self) -> tuple[ReplicaRecord, ...]:
        return self.records

    async def refresh(self) -> tuple[ReplicaRecord, ...]:
        return self.records


async def eventually(condition: object, *, within_s: float = 60.0) -> None:
    """Wait until ``condition()`` holds; ``within_s`` ends a hopeless wait, it is no promise."""
    assert callable(condition)
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        await asyncio.sleep(0.005)
