"""Place 4 of a request: one front's connection to one replica, and the streams that it carries."""

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import replace

import numpy as np

from cluster.config import STARVATION_FACTOR, RouterConfig
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
    """The replica is gone or does not answer, or this stream cannot go on there."""

    def __init__(self, replica_id: str, message: str, *, reason: str, died: bool = False, host: str | None = None) -> None:
        super().__init__(f"replica {replica_id}: {message}")
        self.replica_id = replica_id
        self.reason = reason
        """One word, for counters."""
        self.died = died
        """Whether the replica's process died, maybe because of a request that it computed."""
        self.host = host
        """The host that became unreachable, if that is the reason."""


class StreamBuffer:
    """A queue of the events of one choice, bounded in tokens."""

    def __init__(self, limit_tokens: int, now: float = 0.0, *, key: tuple[str, int, int] = ("", 0, 0)) -> None:
        """``key``: request id, choice and attempt."""
        self._limit, self._key = limit_tokens, key
        self._template = TokenEvent(*self._key, 0)
        """An event with the fields that do not change from token to token."""
        self.last_event_at = now
        """When the last event was put."""
        self._events: deque[TokenEvent] = deque()
        self._num_tokens = 0
        self._end: Exception | None = None
        self._arrived = asyncio.Event()

    def put(self, event: TokenEvent, now: float = 0.0) -> None:
        self.last_event_at = now
        self._num_tokens += len(event.tokens)
        if self._num_tokens > self._limit:
            self.fail(SlowReader(limit_tokens=self._limit))
        elif self._end is None:
            self._events.append(event)
            if (event.num_cached, event.losses) != (self._template.num_cached, self._template.losses):
                self._template = replace(self._template, num_cached=event.num_cached, losses=event.losses)
            self._arrived.set()

    def put_token(self, offset: int, token: int, now: float = 0.0) -> None:
        """Put one token; the other fields are those of the event before."""
        self.put(self._template.with_next_token(offset, token), now)

    def fail(self, error: Exception) -> None:
        """Have `get` raise ``error`` once the events put before have been read."""
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
    """A front's connection to a replica. Ready once the replica has answered a ping; once lost it stays lost.

    Create it in a running event loop. Without ``transport`` it opens a `ZmqTransport`, see there for what that may raise.
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
        """The same buffers, by the stream numbers that this front chose (`Request.tag`)."""
        self._numbers = itertools.count()
        self._pong: Pong | None = None
        self._pong_at = clock()
        self._submitted = self._submitted_tokens = 0
        """Requests sent since the last pong, and tokens to compute for them."""
        self.index = PrefixIndex(max_blocks=config.max_indexed_blocks, clock=clock)
        self._lost: LinkLost | None = None
        self._last_heard_at = self._last_events_at = clock()
        self._transport: Transport = transport or ZmqTransport(record, node=node)
        self._tasks = [asyncio.create_task(self._run_or_lose(work)) for work in (self._receive, self._ping, self._watch_connection)]

    @property
    def id(self) -> str:
        return self.record.id

    @property
    def ready(self) -> bool:
        """Whether the replica reported itself ready over this connection."""
        return self._lost is None and self._pong is not None and self._pong.ready

    @property
    def lost(self) -> bool:
        return self._lost is not None

    @property
    def ranks_lost(self) -> bool:
        """Whether the replica reported that its ranks must be restarted."""
        return self._pong is not None and self._pong.ranks_lost

    @property
    def lost_host(self) -> str | None:
        """The unreachable host that took the replica's ranks with it, as the replica reported."""
        return self._pong.lost_host if self._pong is not None else None

    @property
    def load(self) -> int:
        """Requests at the replica: those of its last pong, plus those that this front has sent since."""
        reported = self._pong.num_running + self._pong.num_waiting if self._pong else 0
        return reported + self._submitted

    @property
    def load_estimate(self) -> LoadEstimate:
        """The load in the last pong, less what the replica must have computed since, plus what this front has sent since."""
        pong = self._pong or Pong(ready=False, num_running=0, num_waiting=0)
        done = (self._clock() - self._pong_at) / pong.step_token_s if pong.step_token_s else 0.0
        return LoadEstimate(
            num_requests=self.load,
            num_running=pong.num_running,
            prefill_tokens=max(0, pong.prefill_tokens + self._submitted_tokens - int(done)),
            step_base_s=pong.step_base_s,
            step_token_s=pong.step_token_s,
        )

    def expect(self, keys: Sequence[bytes], num_tokens: int) -> None:
        """A request is about to be sent. It will add blocks with these keys to the prefix cache, and has ``num_tokens`` to compute."""
        self.index.expect(keys)
        self._submitted_tokens += num_tokens

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Yield the events of one attempt up to and including its last. Closing it early cancels the request at the engine.

        Raises:
            LinkLost: the replica is gone or unreachable.
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
        """Abort all choices of a request on this link and return how many. Readers get `RequestAborted`, the engine a cancel."""
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

    async def _run_or_lose(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run a background task of the link. If it fails the link is lost: its streams move at once, and the router opens a new link."""
        try:
            await work()
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
            self._last_heard_at = self._clock()
            try:
                self._handle(decode(raw))
            except ChannelError as error:
                self._lose(str(error), reason="malformed")
                return

    def _handle(self, message: object) -> None:
        match message:
            case StepEvents():
                self._last_events_at = self._last_heard_at
                self._dispatch_events(message)
            case Pong():
                self._pong, self._pong_at = message, self._clock()
                self._submitted = self._submitted_tokens = 0
            case BlockUpdate():
                self.index.apply(message)
            case FrontDropped():  # this process was stopped or did not read; its streams will get no end
                self._lose("it had dropped this front", reason="given_up")
            case _:
                raise ChannelError(f"a replica does not send {type(message).__name__}")

    def _dispatch_events(self, message: StepEvents) -> None:
        for event in message.events:
            if (buffer := self._streams.get((event.request_id, event.choice, event.attempt))) is not None:
                buffer.put(event, self._last_heard_at)
        if not len(message.streams) == len(message.offsets) == len(message.tokens) or len(message.streams) % COLUMN.itemsize:
            raise ChannelError("malformed StepEvents: its columns do not fit each other")
        columns = [np.frombuffer(column, COLUMN).tolist() for column in (message.streams, message.offsets, message.tokens)]
        for stream, offset, token in zip(*columns, strict=True):
            if (buffer := self._by_number.get(stream)) is not None:
                buffer.put_token(offset, token, self._last_heard_at)

    async def _ping(self) -> None:
        while self._lost is None:
            self._send(Ping())
            if self._config.policy == "expected_wait" and self.index.needs_snapshot:
                self._send(SubscribeBlocks(wanted=True))
            await asyncio.sleep(self._config.ping_s)
            if self._clock() - self._last_heard_at > self._config.replica_silence_s:
                self._lose(f"silent for {self._config.replica_silence_s:g} s", reason="silent", host=await self._unreachable_host())
            self._fail_stalled_streams()

    async def _unreachable_host(self) -> str | None:
        """The replica's host, if that is another host and does not even refuse a connection."""
        address = self.record.address
        if address.node == self._node or address.tcp is None:
            return None
        gone = await asyncio.to_thread(probe_peer, address.tcp, PROBE_TIMEOUT_S) is PeerStatus.HOST_UNREACHABLE
        return (self.record.host or None) if gone else None

    def _fail_stalled_streams(self) -> None:
        """Fail streams that have got no token for `stall_timeout_s`, or for `STARVATION_FACTOR` times as long while other streams do."""
        now, limit_s = self._clock(), self._config.stall_timeout_s
        others_served = now - self._last_events_at <= limit_s
        for buffer in self._streams.values():
            waited_s = now - buffer.last_event_at
            if waited_s > limit_s * (STARVATION_FACTOR if others_served else 1):
                buffer.fail(LinkLost(self.id, f"no token for {waited_s:.1f} s", reason="stalled"))

    def release(self) -> None:
        """Fail all streams as lost, so that they move to another replica or wait at the front; the link itself stays."""
        host = self.lost_host
        message = "its ranks are being restarted" + (f", because host {host} is unreachable" if host else "")
        for buffer in self._streams.values():
            buffer.fail(LinkLost(self.id, message, reason="host_lost" if host else "ranks_lost", host=host))

    async def _watch_connection(self) -> None:
        """Detect a killed process by its closed connection, long before the silence timeout."""
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
