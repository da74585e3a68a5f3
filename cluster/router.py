"""Place 4 of a request: choose a replica for it, and move its stream to another replica when that one is lost.

A front keeps the committed tokens of every choice: those it has already sent towards the client. When a replica is lost, the
router submits prompt + committed tokens to another one with the next attempt number. Sampling noise depends only on seed, choice
and position, so the new replica continues with the same tokens. Events of earlier attempts are dropped (fencing).
"""

import asyncio
import dataclasses
import itertools
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Protocol

from cluster.admission_queue import AdmissionQueue
from cluster.config import RouterConfig
from cluster.directory import ReplicaRecord
from cluster.errors import HostLost, NoReplicaReady, RequestAborted
from cluster.health import State
from cluster.replica_link import LinkLost
from cluster.resume import LossHistory, ResumePolicy
from cluster.routing_policies import Candidate, LeastLoaded, RoutingPolicy
from engine.errors import DeadlineExceeded
from engine.failpoints import hit
from engine.plan import TokenEvent
from engine.request import Request
from engine.request_trace import trace_place

logger = logging.getLogger(__name__)

QUEUE_FULL_S = 0.1
"""How long a tenant's requests are refused at the front after every replica has answered that its queue is full. At ten times the
sustainable load this spares most refused requests the round trip; it is short enough that the queues never run empty."""
MAX_FULL_TENANTS = 1_000
"""How many tenants with full queues are remembered."""


class Link(Candidate, Protocol):
    """A connection to one replica, such as `cluster.replica_link.ReplicaLink`."""

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
    """Source of the list of replicas, such as `cluster.directory.Reader`."""

    @property
    def known(self) -> tuple[ReplicaRecord, ...]: ...
    async def refresh(self) -> tuple[ReplicaRecord, ...]: ...


class Router:
    """A front's source of tokens: one `stream` method in front of any number of replicas."""

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
        """By replica: the reason that was logged last."""
        self._refreshing: asyncio.Task[None] | None = None
        self._num_choices_waiting: Counter[str] = Counter()
        """By request id: how many of its choices wait for a replica."""
        self._aborted_while_waiting: set[str] = set()
        """Ids of those requests that were aborted while they waited."""
        self.resumes = ResumePolicy(self._config, clock)
        self._queue_full: dict[str, dict[str, tuple[float, TokenEvent]]] = {}
        """Tenant -> replica id -> (time until which its QueueFull answer is reused, that answer)."""

    async def open(self) -> None:
        """Start to poll the directory."""
        self._refreshing = asyncio.create_task(self._refresh_forever(), name="router-refresh")

    async def close(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        links, self._links = self._links, {}
        for link in links.values():
            await link.close()

    def ready(self) -> bool:
        """Whether a replica is ready, or one would be started for a request that comes now."""
        if any(link.ready for link in self._links.values()):
            return True
        return self.admission_queue.can_scale_from_zero and not any(
            record.state in (State.RECOVERING, State.FAILED) for record in self.replicas
        )

    @property
    def replicas(self) -> tuple[ReplicaRecord, ...]:
        """All replicas that the directory knows, ready or not."""
        return self._replicas.known

    def abort(self, request_id: str) -> int:
        """Abort a request of this front: each of its choices ends with `RequestAborted`. Returns how many there were."""
        waiting = self._num_choices_waiting[request_id]
        if waiting:
            self._aborted_while_waiting.add(request_id)
        return waiting + sum(link.abort(request_id) for link in self._links.values())

    def recent_refusal(self, tenant: str) -> TokenEvent | None:
        """The QueueFull answer to give this tenant without asking a replica, or None.

        There is one if every ready replica gave one within `QUEUE_FULL_S`. Call it before the request is parsed, which is most of the
        cost of a refusal.
        """
        refusals = self._queue_full.get(tenant)
        if refusals is None:
            return None
        now, ready = self._clock(), [link.id for link in self._links.values() if link.ready]
        if ready and all(refusals.get(replica, (0.0, None))[0] > now for replica in ready):
            return refusals[ready[0]][1]
        if all(until <= now for until, _ in refusals.values()):
            del self._queue_full[tenant]
        return None

    def _record_queue_full(self, tenant: str, replica: str, event: TokenEvent) -> None:
        if len(self._queue_full) >= MAX_FULL_TENANTS:
            self._queue_full.clear()
        self._queue_full.setdefault(tenant, {})[replica] = (self._clock() + QUEUE_FULL_S, event)

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Yield every token of one choice exactly once and in order, across replica losses. Closing it early cancels the choice.

        Errors of the request itself come as its last event (`TokenEvent.error_kind`).

        Raises:
            NoReplicaReady: no replica became ready in time; HostLost if the reason is that a host became unreachable.
            DeadlineExceeded: no replica became ready before the request's own deadline.
            ReplicaLost, ResumesExhausted: no attempt is left to this choice, or to all requests of this front together.
            PoisonedRequest: the request was running when replicas died, often enough to be blamed for it; or it is in quarantine.
            SlowReader: too many tokens wait for the reader.
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
                        history.check_event(event, link.id, len(committed))
                        if not event.tokens and event.finish_reason is None:
                            continue  # it only reports a loss of ranks
                        if event.error_kind == "PoisonedRequest":
                            self.resumes.record_poisoned(request)
                        if event.error_kind == "QueueFull":
                            self._record_queue_full(request.tenant, link.id, event)
                        if num_cached is None:
                            self.admission_queue.record_ttft(self._clock() - sent)
                            event = dataclasses.replace(event, held_s=held_s)
                        committed.extend(event.tokens)
                        num_cached = event.num_cached if num_cached is None else num_cached
                        yield event if event.num_cached == num_cached else dataclasses.replace(event, num_cached=num_cached)
                        if event.finish_reason is not None:
                            return
                raise LinkLost(link.id, "closed the stream before its last event", reason="cut")
            except LinkLost as loss:
                hit("router.resume")
                self.resumes.allow(history, loss, len(committed))

    async def _choose(self, request: Request, history: LossHistory) -> Link:
        """Choose a ready replica, waiting for one if need be. Replicas that have lost this request come last."""
        self._num_choices_waiting[request.id] += 1
        try:
            return await self._wait_for_ready(request, history.lost_by)
        except NoReplicaReady as error:
            if history.lost_host is None:
                raise
            raise HostLost(host=history.lost_host, waited_s=error.waited_s) from error
        finally:
            self._num_choices_waiting[request.id] -= 1
            if not self._num_choices_waiting[request.id]:
                del self._num_choices_waiting[request.id]
                self._aborted_while_waiting.discard(request.id)

    async def _wait_for_ready(self, request: Request, lost_by: Sequence[str]) -> Link:
        if (link := self._ready_link(request, lost_by)) is not None:
            return link
        started = self._clock()
        with self.admission_queue.hold(request):
            while (link := self._ready_link(request, lost_by)) is None:
                waited_s = self._clock() - started
                left_s = self.admission_queue.wait_s - waited_s
                if request.deadline_s is not None:
                    until_deadline_s = request.deadline_s - self._unix_clock()
                    if until_deadline_s <= 0:
                        raise DeadlineExceeded(f"the request's deadline passed before a replica became ready; it waited {waited_s:.1f} s")
                    left_s = min(left_s, until_deadline_s)
                if left_s <= 0:
                    raise NoReplicaReady(waited_s=round(waited_s, 1))
                await self._sleep(min(0.05, left_s))
        return link

    def _ready_link(self, request: Request, lost_by: Sequence[str]) -> Link | None:
        if request.id in self._aborted_while_waiting:
            raise RequestAborted
        candidates = [link for link in self._links.values() if link.ready]
        others = [link for link in candidates if link.id not in lost_by]
        return self._policy.choose(others or candidates, request) if candidates else None

    async def _refresh_forever(self) -> None:
        while True:
            try:
                await self.update_links(await self._replicas.refresh())
                self._release_lost_ranks()
            except Exception:
                logger.exception("could not follow the directory")
            await self._sleep(self._config.refresh_s)

    async def update_links(self, records: Sequence[ReplicaRecord]) -> None:
        """Keep one link to each replica of ``records``. A replica that the directory no longer lists keeps its link until that is lost."""
        for replica_id, link in list(self._links.items()):
            if link.lost:
                del self._links[replica_id]
                await link.close()
        for record in records:
            if record.id in self._links:
                continue
            try:
                self._links[record.id] = self._connect(record)
            except Exception as error:  # tried again at the next refresh; it must not keep the others from being connected
                self._log_unreachable(record, str(error))
            else:
                self._unreachable.pop(record.id, None)

    def _release_lost_ranks(self) -> None:
        """Take streams back from replicas that restart their ranks, if another replica is ready to continue them sooner.

        A replica that lost a host cannot continue until Ray has found it another host, so its streams are always taken back: they
        wait here instead, for `ready_wait_s` at most.
        """
        lost = [link for link in self._links.values() if link.ranks_lost]
        is_ready = bool(lost) and self.ready()
        for link in lost:
            if is_ready or link.lost_host is not None:
                link.release()

    def _log_unreachable(self, record: ReplicaRecord, reason: str) -> None:
        if self._unreachable.get(record.id) != reason:
            logger.warning("replica %s cannot be reached: %s", record.id, reason)
        self._unreachable[record.id] = reason
