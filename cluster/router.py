"""Step 4 of a request: choose a replica, and outlive its loss without the client noticing.

A front keeps what it has handed on of every choice (its committed tokens). When a replica is lost, prompt and committed
tokens go to another under the next attempt number. The noise of a position is a function of seed, choice and position
alone, so the new replica goes on where the old one was. Events of earlier attempts are dropped (fencing).
"""

import asyncio
import dataclasses
import itertools
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Protocol, TypeVar

from cluster.admission_queue import AdmissionQueue
from cluster.config import RouterConfig
from cluster.directory import ReplicaRecord
from cluster.errors import HostLost, NoReplicaReady, RequestAborted
from cluster.expected_wait import RoutableReplica
from cluster.health import State
from cluster.replica_link import LinkLost
from cluster.resume import LossHistory, ResumePolicy
from engine.failpoints import hit
from engine.plan import TokenEvent
from engine.request import Request
from engine.request_trace import trace_place

logger = logging.getLogger(__name__)

FULL_FOR_S = 0.1
"""For how long a tenant's next requests are refused unasked after no replica had a place in its queue: at ten times as many requests
as can be answered most are spared the way there, and the queue is never empty for want of one that asks."""
MAX_FULL = 1_000
"""Tenants that are remembered so."""


class Candidate(RoutableReplica, Protocol):
    """A replica that may be chosen."""

    @property
    def load(self) -> int: ...


AnyCandidate = TypeVar("AnyCandidate", bound=Candidate)


class RoutingPolicy(Protocol):
    def choose(self, candidates: Sequence[AnyCandidate], request: Request) -> AnyCandidate:
        """One of ``candidates``, of which there is at least one."""
        ...


class LeastLoaded:
    """The replica with the fewest requests; of equals, each in turn."""

    def __init__(self) -> None:
        self._turn = itertools.count()

    def choose(self, candidates: Sequence[AnyCandidate], request: Request) -> AnyCandidate:
        least = min(candidate.load for candidate in candidates)
        equals = [candidate for candidate in candidates if candidate.load == least]
        return equals[next(self._turn) % len(equals)]


class RoundRobin:
    """Each replica in turn."""

    def __init__(self) -> None:
        self._turn = itertools.count()

    def choose(self, candidates: Sequence[AnyCandidate], request: Request) -> AnyCandidate:
        return candidates[next(self._turn) % len(candidates)]


class Link(Candidate, Protocol):
    """A connection to one replica; `cluster.replica_link.ReplicaLink` is one."""

    @property
    def record(self) -> ReplicaRecord: ...
    @property
    def ready(self) -> bool: ...
    @property
    def lost(self) -> bool: ...
    @property
    def ranks_lost(self) -> bool: ...
    @property
    def lost_host(self) -> str | None: ...
    def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]: ...
    def abort(self, request_id: str) -> int: ...
    def release(self) -> None: ...
    async def close(self) -> None: ...


class Replicas(Protocol):
    """Where the router learns which replicas there are; `cluster.directory.Reader` is one."""

    @property
    def known(self) -> tuple[ReplicaRecord, ...]: ...
    async def refresh(self) -> tuple[ReplicaRecord, ...]: ...


class Router:
    """The source of tokens for a front: one interface, any number of replicas behind it."""

    def __init__(
        self,
        *,
        replicas: Replicas,
        connect: Callable[[ReplicaRecord], Link],
        policy: RoutingPolicy | None = None,
        config: RouterConfig | None = None,
        admission_queue: AdmissionQueue | None = None,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._replicas, self._connect = replicas, connect
        self._policy: RoutingPolicy = policy or LeastLoaded()
        self._config = config or RouterConfig()
        self._clock, self._unix_clock, self._sleep = clock, unix_clock, sleep
        self.admission_queue = admission_queue or AdmissionQueue(wait_s=self._config.ready_wait_s, clock=clock)
        self._links: dict[str, Link] = {}
        self._unreachable: dict[str, str] = {}
        """Why, as it was logged last."""
        self._refreshing: asyncio.Task[None] | None = None
        self._choosing: Counter[str] = Counter()
        """Choices of each request that wait for a replica."""
        self._aborted: set[str] = set()
        """Of those, the requests that shall not get one."""
        self.resumes = ResumePolicy(self._config, clock)
        self._full: dict[str, dict[str, tuple[float, TokenEvent]]] = {}
        """Tenants whose request was refused for lack of a place in a queue: by which replicas, until when that holds, and the refusal."""

    async def open(self) -> None:
        """Begin to follow the directory."""
        self._refreshing = asyncio.create_task(self._refresh_for_ever(), name="router-refresh")

    async def close(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        links, self._links = self._links, {}
        for link in links.values():
            await link.close()

    def ready(self) -> bool:
        """Whether a request would find a replica now, or one would be started for it."""
        if any(link.ready for link in self._links.values()):
            return True
        return self.admission_queue.can_scale_from_zero and not any(
            record.state in (State.RECOVERING, State.FAILED) for record in self.replicas
        )

    @property
    def replicas(self) -> tuple[ReplicaRecord, ...]:
        """What the directory knows, ready or not."""
        return self._replicas.known

    def abort(self, request_id: str) -> int:
        """End a request that this front has under way: its choices, as many as are given back, end with `RequestAborted`."""
        waiting = self._choosing[request_id]
        if waiting:
            self._aborted.add(request_id)
        return waiting + sum(link.abort(request_id) for link in self._links.values())

    def recent_refusal(self, tenant: str) -> TokenEvent | None:
        """What the replicas said to requests of the same tenant a moment ago, if each that is ready said that too many wait: to be asked
        before a request is read, which is most of the work that one more refusal takes."""
        said = self._full.get(tenant)
        if said is None:
            return None
        now, ready = self._clock(), [link.id for link in self._links.values() if link.ready]
        if ready and all(said.get(replica, (0.0, None))[0] > now for replica in ready):
            return said[ready[0]][1]
        if all(until <= now for until, _ in said.values()):
            del self._full[tenant]
        return None

    def _note_full(self, tenant: str, replica: str, event: TokenEvent) -> None:
        if len(self._full) >= MAX_FULL:
            self._full.clear()
        self._full.setdefault(tenant, {})[replica] = (self._clock() + FULL_FOR_S, event)

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Every token of one choice once and in order, up to its end. Closing it early cancels the choice.

        Errors of the request itself come as its last event (`TokenEvent.error_kind`).

        Raises:
            NoReplicaReady: none became ready in time; HostLost, where that is because a host cannot be reached any more.
            ReplicaLost, ResumesExhausted: its attempts, or those of all requests together, are used up.
            PoisonedRequest: the request was present at two deaths of replicas, now or a while ago.
            SlowReader: the reader let too many tokens wait.
            RequestAborted: see `abort`.
        """
        history = self.resumes.admit(request)
        committed = list(request.committed)
        num_cached: int | None = None
        self.admission_queue.count_request()
        held_s, sent = 0.0, self._clock()
        for attempt in itertools.count(request.attempt):
            before = self._clock()
            hit("router.choose")
            link = await self._choose(request, history)
            sent = self._clock()
            held_s += sent - before
            trace_place(4, request.id)
            current = dataclasses.replace(request, attempt=attempt, committed=tuple(committed), losses=history.losses)
            try:
                async with aclosing(link.stream(current)) as events:
                    async for event in events:
                        if event.attempt != attempt:
                            continue
                        history.hear(event, link.id, len(committed))
                        if not event.tokens and event.finish_reason is None:
                            continue  # only the news of a loss
                        if event.error_kind == "PoisonedRequest":
                            self.resumes.note_poisoned(request)
                        if event.error_kind == "QueueFull":
                            self._note_full(request.tenant, link.id, event)
                        if num_cached is None:
                            self.admission_queue.record_ttft(self._clock() - sent)
                            event = dataclasses.replace(event, held_s=held_s)
                        committed.extend(event.tokens)
                        num_cached = event.num_cached if num_cached is None else num_cached
                        yield event if event.num_cached == num_cached else dataclasses.replace(event, num_cached=num_cached)
                        if event.finish_reason is not None:
                            return
                raise LinkLost(link.id, "ended the stream without an end", reason="cut")
            except LinkLost as loss:
                hit("router.resume")
                self.resumes.allow(history, loss, len(committed))

    async def _choose(self, request: Request, history: LossHistory) -> Link:
        """A ready replica, waited for if there is none; one that has just lost the request only if there is no other."""
        self._choosing[request.id] += 1
        try:
            return await self._wait_for_ready(request, history.lost_by)
        except NoReplicaReady as error:
            if history.lost_host is None:
                raise
            raise HostLost(host=history.lost_host, waited_s=error.waited_s) from error
        finally:
            self._choosing[request.id] -= 1
            if not self._choosing[request.id]:
                del self._choosing[request.id]
                self._aborted.discard(request.id)

    async def _wait_for_ready(self, request: Request, lost_by: Sequence[str]) -> Link:
        if (link := self._ready_link(request, lost_by)) is not None:
            return link
        begun = self._clock()
        with self.admission_queue.hold(request):
            while (link := self._ready_link(request, lost_by)) is None:
                left_s = self.admission_queue.wait_s - (self._clock() - begun)
                if request.deadline_s is not None:
                    left_s = min(left_s, request.deadline_s - self._unix_clock())
                if left_s <= 0:
                    raise NoReplicaReady(waited_s=round(self._clock() - begun, 1))
                await self._sleep(min(0.05, left_s))
        return link

    def _ready_link(self, request: Request, lost_by: Sequence[str]) -> Link | None:
        if request.id in self._aborted:
            raise RequestAborted
        candidates = [link for link in self._links.values() if link.ready]
        others = [link for link in candidates if link.id not in lost_by]
        return self._policy.choose(others or candidates, request) if candidates else None

    async def _refresh_for_ever(self) -> None:
        while True:
            try:
                await self.follow(await self._replicas.refresh())
                self._leave_lost_ranks()
            except Exception:
                logger.exception("could not follow the directory")
            await self._sleep(self._config.refresh_s)

    async def follow(self, records: Sequence[ReplicaRecord]) -> None:
        """Have one link to each replica of ``records``. One that the directory forgot is kept until it is really lost."""
        for replica_id, link in list(self._links.items()):
            if link.lost:
                del self._links[replica_id]
                await link.close()
        for record in records:
            if record.id in self._links:
                continue
            try:
                self._links[record.id] = self._connect(record)
            except Exception as error:  # it can be tried again, and must not stand before those that can be reached
                self._note_unreachable(record, str(error))
            else:
                self._unreachable.pop(record.id, None)

    def _leave_lost_ranks(self) -> None:
        """A replica restores its ranks by itself, but another that is ready goes on with its streams sooner. One that lost a host
        can do nothing before Ray has found it another, so its streams wait here, where the limit is `ready_wait_s`."""
        lost = [link for link in self._links.values() if link.ranks_lost]
        is_ready = bool(lost) and self.ready()
        for link in lost:
            if is_ready or link.lost_host is not None:
                link.release()

    def _note_unreachable(self, record: ReplicaRecord, reason: str) -> None:
        if self._unreachable.get(record.id) != reason:
            logger.warning("replica %s cannot be reached: %s", record.id, reason)
        self._unreachable[record.id] = reason
