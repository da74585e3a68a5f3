"""Step 4 of a request, the transport: one front's connection to one replica, and the streams that run over it."""

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cluster.config import STARVED, RouterConfig
from cluster.directory import ReplicaRecord
from cluster.errors import ChannelError, RequestAborted, SlowReader
from cluster.expected_wait import LoadEstimate
from cluster.messages import BlockUpdate, Cancel, FrontDropped, Message, Ping, Pong, StepEvents, Submit, SubscribeBlocks, decode, encode
from cluster.peer_liveness import PROBE_TIMEOUT_S, PeerStatus, probe_peer
from cluster.prefix_index import PrefixIndex
from cluster.transport import Transport, TransportBroken, ZmqTransport
from engine.failpoints import hit
from engine.plan import COLUMN, TokenEvent
from engine.request import Request

logger = logging.getLogger(__name__)


class LinkLost(Exception):
    """The replica at the other end is gone, or does not answer."""

    def __init__(self, replica_id: str, message: str, *, reason: str, died: bool = False, host: str | None = None) -> None:
        super().__init__(f"replica {replica_id}: {message}")
        self.replica_id = replica_id
        self.reason = reason
        """In one word, for counters."""
        self.died = died
        """Whether the replica's death may have to do with what it ran."""
        self.host = host
        """The host that cannot be reached any more, where that is the reason."""


class StreamBuffer:
    """Events of one choice on their way to its reader, bounded by tokens."""

    def __init__(self, limit_tokens: int, now: float = 0.0, *, key: tuple[str, int, int] = ("", 0, 0)) -> None:
        """``key``: request id, choice and attempt."""
        self._limit, self._key = limit_tokens, key
        self._like = TokenEvent(*self._key, 0)
        """What does not change from token to token."""
        self.heard = now
        """When something was put in last."""
        self._events: deque[TokenEvent] = deque()
        self._num_tokens = 0
        self._end: Exception | None = None
        self._arrived = asyncio.Event()

    def put(self, event: TokenEvent, now: float = 0.0) -> None:
        self.heard = now
        self._num_tokens += len(event.tokens)
        if self._num_tokens > self._limit:
            self.fail(SlowReader(limit_tokens=self._limit))
        elif self._end is None:
            self._events.append(event)
            if (event.num_cached, event.losses) != (self._like.num_cached, self._like.losses):
                self._like = replace(self._like, num_cached=event.num_cached, losses=event.losses)
            self._arrived.set()

    def put_token(self, offset: int, token: int, now: float = 0.0) -> None:
        """One more token; all else is as in the event before."""
        self.put(self._like.with_next_token(offset, token), now)

    def fail(self, error: Exception) -> None:
        """What was put before can still be read; then ``error`` is raised."""
        self._end = self._end or error
        self._arrived.set()

    async def get(self) -> TokenEvent:
        while not self._events:
            if self._end is not None:
                raise self._end
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        self._num_tokens -= len(event.tokens)
        return event


class ReplicaLink:
    """The streams of one front to one replica. Usable once the replica has answered a ping; once lost it stays lost.

    Must be made in a running event loop. Without ``transport`` it makes its own; see `ZmqTransport` for what that may raise.
    """

    def __init__(
        self,
        record: ReplicaRecord,
        *,
        node: str,
        config: RouterConfig,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
        transport: Transport | None = None,
    ) -> None:
        self.record = record
        self._node = node
        self._config, self._clock, self._unix_clock = config, clock, unix_clock
        self._streams: dict[tuple[str, int, int], StreamBuffer] = {}
        self._by_number: dict[int, StreamBuffer] = {}
        """The same, by the numbers that the replica was told to speak of them."""
        self._numbers = itertools.count()
        self._pong: Pong | None = None
        self._pong_at = clock()
        self._submitted = self._submitted_tokens = 0
        """Requests, and tokens that are to be computed for them, since the replica told its load."""
        self.index = PrefixIndex(max_blocks=config.max_indexed_blocks, clock=clock)
        self._lost: LinkLost | None = None
        self._heard = self._served = clock()
        self._transport: Transport = transport or ZmqTransport(record, node=node)
        self._tasks = [asyncio.create_task(self._or_lost(work)) for work in (self._receive(), self._ping(), self._watch_connection())]

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def ready(self) -> bool:
        """Whether the replica itself said so, over this connection."""
        return self._lost is None and self._pong is not None and self._pong.ready

    @property
    def lost(self) -> bool:
        return self._lost is not None

    @property
    def ranks_lost(self) -> bool:
        """Whether the replica said that its ranks have to be started anew."""
        return self._pong is not None and self._pong.ranks_lost

    @property
    def lost_host(self) -> str | None:
        """The host that took the replica's ranks with it, as the replica said."""
        return self._pong.lost_host if self._pong is not None else None

    @property
    def load(self) -> int:
        """Requests at the replica: as it said last, and what this front has sent since."""
        told = self._pong.num_running + self._pong.num_waiting if self._pong else 0
        return told + self._submitted

    @property
    def load_estimate(self) -> LoadEstimate:
        """As the replica said last; what it must have computed since is taken off, what this front has sent since is added."""
        told = self._pong or Pong(ready=False, num_running=0, num_waiting=0)
        done = (self._clock() - self._pong_at) / told.step_token_s if told.step_token_s else 0.0
        return LoadEstimate(
            num_requests=self.load,
            num_running=told.num_running,
            prefill_tokens=max(0, told.prefill_tokens + self._submitted_tokens - int(done)),
            step_base_s=told.step_base_s,
            step_token_s=told.step_token_s,
        )

    def expect(self, keys: Sequence[bytes], num_tokens: int) -> None:
        """A request is about to be sent that will leave blocks of these keys, and have ``num_tokens`` computed."""
        self.index.expect(keys)
        self._submitted_tokens += num_tokens

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Events of one attempt, up to and including its end. Closing it early cancels the request at the engine.

        Raises:
            LinkLost: the replica is gone, or not to be reached.
            SlowReader: too many tokens wait for the reader.
        """
        if self._lost is not None:
            raise self._lost
        key = (request.id, request.choice, request.attempt)
        number = next(self._numbers)
        buffer = StreamBuffer(self._config.max_buffered_tokens, self._clock(), key=key)
        self._streams[key] = self._by_number[number] = buffer
        ended = False
        try:
            self._submitted += 1
            left_s = None if request.deadline_s is None else request.deadline_s - self._unix_clock()
            self._send(Submit(replace(request, tag=number), left_s))
            while not ended:
                event = await buffer.get()
                ended = event.finish_reason is not None
                yield event
        finally:
            self._streams.pop(key, None)
            self._by_number.pop(number, None)
            if not ended and self._lost is None:
                self._send(Cancel(*key))

    def abort(self, request_id: str) -> int:
        """End all choices of a request that run over this link; how many. Their readers get `RequestAborted`, the engine a cancel."""
        buffers = [buffer for key, buffer in self._streams.items() if key[0] == request_id]
        for buffer in buffers:
            buffer.fail(RequestAborted())
        return len(buffers)

    async def close(self) -> None:
        self._lose("closed", reason="closed")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._transport.close()

    async def _or_lost(self, work: Coroutine[Any, Any, None]) -> None:
        """Without any part of its work a link is none: its streams go elsewhere at once, and the router makes another."""
        try:
            await work
        except Exception as error:
            logger.exception("the link to replica %s failed", self.id)
            self._lose(f"failed here: {error}", reason="failed")

    def _send(self, message: Message) -> None:
        if hit("link.send"):
            return
        try:
            self._transport.send(encode(message))
        except TransportBroken as error:
            self._lose(str(error), reason="unsendable")

    async def _receive(self) -> None:
        while True:
            raw = await self._transport.receive()
            if hit("link.receive"):
                continue
            self._heard = self._clock()
            try:
                self._take(decode(raw))
            except ChannelError as error:
                self._lose(str(error), reason="malformed")
                return

    def _take(self, message: object) -> None:
        match message:
            case StepEvents():
                self._served = self._heard
                self._hand_out(message)
            case Pong():
                self._pong, self._pong_at = message, self._clock()
                self._submitted = self._submitted_tokens = 0
            case BlockUpdate():
                self.index.take(message)
            case FrontDropped():  # this process stood still, or did not read: no end of its streams will come any more
                self._lose("it had given this front up", reason="given_up")
            case _:
                raise ChannelError(f"a replica does not send {type(message).__name__}")

    def _hand_out(self, told: StepEvents) -> None:
        for event in told.events:
            if (buffer := self._streams.get((event.request_id, event.choice, event.attempt))) is not None:
                buffer.put(event, self._heard)
        if not len(told.streams) == len(told.offsets) == len(told.tokens) or len(told.streams) % COLUMN.itemsize:
            raise ChannelError("malformed StepEvents: its columns do not fit each other")
        columns = [np.frombuffer(column, COLUMN).tolist() for column in (told.streams, told.offsets, told.tokens)]
        for stream, offset, token in zip(*columns, strict=True):
            if (buffer := self._by_number.get(stream)) is not None:
                buffer.put_token(offset, token, self._heard)

    async def _ping(self) -> None:
        while self._lost is None:
            self._send(Ping())
            if self._config.policy == "expected_wait" and self.index.needs_snapshot:
                self._send(SubscribeBlocks(wanted=True))
            await asyncio.sleep(self._config.ping_s)
            if self._clock() - self._heard > self._config.replica_silence_s:
                self._lose(f"silent for {self._config.replica_silence_s:g} s", reason="silent", host=await self._unreachable_host())
            self._leave_stalled()

    async def _unreachable_host(self) -> str | None:
        """The replica's host, if it is another one and does not even refuse a connection."""
        address = self.record.address
        if address.node == self._node or address.tcp is None:
            return None
        gone = await asyncio.to_thread(probe_peer, address.tcp, PROBE_TIMEOUT_S) is PeerStatus.HOST_UNREACHABLE
        return (self.record.host or None) if gone else None

    def _leave_stalled(self) -> None:
        """A stream without tokens is stalled if nobody else of this front gets any, or after a much longer time."""
        now, limit_s = self._clock(), self._config.stall_timeout_s
        is_served = now - self._served <= limit_s
        for buffer in self._streams.values():
            waited_s = now - buffer.heard
            if waited_s > limit_s * (STARVED if is_served else 1):
                buffer.fail(LinkLost(self.id, f"no token for {waited_s:.1f} s", reason="stalled"))

    def release(self) -> None:
        """Have all streams end as lost, because there is a better place for them, or because of a host there will hardly be one here."""
        host = self.lost_host
        message = "its ranks are being started anew" + (f", as host {host} cannot be reached any more" if host else "")
        for buffer in self._streams.values():
            buffer.fail(LinkLost(self.id, message, reason="host_lost" if host else "ranks_lost", host=host))

    async def _watch_connection(self) -> None:
        """A killed process closes its sockets: seen here long before its silence is."""
        await self._transport.closed()
        self._lose("its connection was closed", reason="disconnected", died=True)

    def _lose(self, message: str, *, reason: str, died: bool = False, host: str | None = None) -> None:
        if self._lost is None:
            self._lost = LinkLost(self.id, message, reason=reason, died=died, host=host)
            for buffer in self._streams.values():
                buffer.fail(self._lost)

    def __repr__(self) -> str:
        state = "lost" if self.lost else "ready" if self.ready else "not ready"
        return f"<ReplicaLink {self.id} {state} [{len(self._streams)} streams | load {self.load}]>"
