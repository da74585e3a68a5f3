"""Place 14 of a request: the bypass, a socket by which a front sends chunks of response streams to the proxy of its host, past Ray.

Through Ray each chunk of each stream would be a message of its own, at about a millisecond of CPU on both sides together. Here one message
holds all chunks that are ready at the same time, usually a step's tokens for all streams of a front.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import zmq

from cluster.channel import PrivateFolder, shared_context

logger = logging.getLogger(__name__)

MESSAGE_BYTES = 64 << 10
"""A message of this size is sent at once, so it exceeds this by less than one chunk, except to a proxy that was stalled."""
MAX_QUEUED_BYTES = 64 << 20
"""zmq's queue to one proxy holds this much, in messages of `MESSAGE_BYTES`. Later chunks wait here and go together."""
MAX_WAITING_BYTES = 192 << 20
"""If more than this waits for a proxy, the proxy is given up."""
CHECK_INTERVAL_S = 0.1
"""How often a sender checks whether a stalled proxy reads again or is gone."""
MAX_STALL_S = 60.0
"""How long a proxy that listens may read nothing before it is given up; its connection may be lost, and is not made again."""
CONNECT_S = 5.0
"""Connecting within a host takes milliseconds; after this time a new sender is tried."""
NONCE_BITS = 24

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[list[int], list[bytes]]).decode


class ChunksLost(Exception):
    """Some chunks that were sent did not arrive."""


class SocketUnavailable(Exception):
    """This process could not open a socket; the message says why."""


def new_answer_number(stream: int) -> int:
    """A number for one response to a stream's request. There may be several: Ray may retry a request at another front while the first
    front still writes."""
    return stream << NONCE_BITS | secrets.randbits(NONCE_BITS)


class Sender:
    """The front's end of the bypass to one proxy. Belongs to one event loop.

    Raises:
        SocketUnavailable: no socket could be connected to ``address``.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        with contextlib.ExitStack() as undone:
            try:
                self._socket: zmq.Socket[bytes] = undone.enter_context(zmq.Socket(shared_context(), zmq.PUSH))
                self._socket.linger = 1000
                self._socket.sndhwm = MAX_QUEUED_BYTES // MESSAGE_BYTES
                self._socket.immediate = True  # do not queue messages for a connection that may never come
                self._socket.reconnect_ivl = -1  # a restarted proxy listens at another address
                self._socket.connect(address)
            except zmq.ZMQError as error:
                raise SocketUnavailable(f"{address}: {error}") from error
            undone.pop_all()
        self._connect_deadline = time.monotonic() + CONNECT_S
        self._answers: list[int] = []
        self._chunks: list[bytes] = []
        self._num_bytes = 0
        self._flush_at_bytes = MESSAGE_BYTES
        self._is_broken = self._was_connected = False
        self._stalled_since: float | None = None

    @property
    def is_connected(self) -> bool:
        """Whether a message could be sent now."""
        return not self._is_broken and bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLOUT)

    @property
    def is_lost(self) -> bool:
        """Whether the proxy is gone or given up."""
        if self._is_broken or not socket_exists(self._address):
            return True
        if self.is_connected:
            self._was_connected, self._stalled_since = True, None
            return False
        return not self._may_recover() if self._was_connected else time.monotonic() > self._connect_deadline

    def put(self, answer: int, chunk: bytes) -> None:
        """Send a chunk, together with all others that are put in this turn of the event loop, or before `MESSAGE_BYTES` are reached.

        Raises:
            ChunksLost: an earlier chunk could not be sent, maybe one of another stream.
        """
        if self._is_broken:
            raise ChunksLost("the proxy does not take chunks of streams any more")
        if not self._answers:
            asyncio.get_running_loop().call_soon(self._flush)
        self._answers.append(answer)
        self._chunks.append(chunk)
        self._num_bytes += len(chunk)
        if self._num_bytes >= self._flush_at_bytes:
            self._flush()

    def _flush(self) -> None:
        """Send what was put. While the proxy is stalled nothing is sent, so that the chunks of many steps go as one message: the queue is
        limited in messages, not in bytes."""
        if not self._answers or self._is_broken:  # sent before, because `MESSAGE_BYTES` were reached
            return
        if not self.is_connected and self._num_bytes < MAX_WAITING_BYTES and self._may_recover():
            self._was_connected, self._flush_at_bytes = True, MAX_WAITING_BYTES
            asyncio.get_running_loop().call_later(CHECK_INTERVAL_S, self._flush)
            return
        self._stalled_since = None
        answers, self._answers = self._answers, []
        chunks, self._chunks = self._chunks, []
        self._num_bytes, self._flush_at_bytes = 0, MESSAGE_BYTES
        try:
            self._socket.send(_encode((answers, chunks)), zmq.NOBLOCK)
        except zmq.ZMQError:  # the proxy is gone, or was stalled for too long
            self._is_broken = True

    def _may_recover(self) -> bool:
        """Whether a proxy that reads nothing now may read later."""
        self._stalled_since = self._stalled_since or time.monotonic()
        return time.monotonic() - self._stalled_since < MAX_STALL_S and is_listening(self._address)

    def close(self) -> None:
        self._is_broken = True
        self._socket.close()


def socket_exists(address: str) -> bool:
    """Whether a Unix socket exists in this process's file system. A front in another container than its host's proxy may not see it."""
    return address.startswith("ipc://") and os.path.exists(address.removeprefix("ipc://"))


def is_listening(address: str) -> bool:
    """Whether a process listens at a socket of this host, even a stopped one. The kernel refuses connections to a process that is gone."""
    try:
        probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError:  # no file descriptor is left to try with
        return True
    with probe:
        probe.setblocking(False)
        try:
            probe.connect(address.removeprefix("ipc://"))
        except BlockingIOError:  # its backlog of connections is full
            return True
        except OSError:
            return False
        return True


@dataclass
class IncomingStream:
    """The chunks of one response stream. Until `begin` says which response is the right one, those of all responses are kept."""

    number: int
    close: Callable[[], None]
    _answer: int | None = None
    _chunks_by_answer: dict[int, list[bytes]] = field(default_factory=dict)
    _chunks: list[bytes] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _num_received: int = 0
    _has_ended: bool = False
    _total: int | None = None

    def put(self, answer: int, chunk: bytes) -> None:
        if answer == self._answer and not self._has_ended:
            self._chunks.append(chunk)
            self._num_received += 1
            self._changed.set()
        elif self._answer is None:
            self._chunks_by_answer.setdefault(answer, []).append(chunk)

    def begin(self, answer: int) -> None:
        """Accept the chunks of response ``answer`` and drop those of all others."""
        self._answer, self._chunks = answer, self._chunks_by_answer.pop(answer, [])
        self._num_received = len(self._chunks)
        self._chunks_by_answer.clear()

    def end_after(self, total: int) -> None:
        """The response has ended; it had ``total`` chunks."""
        self._total = total
        self._changed.set()

    def end_here(self) -> None:
        """No end will be reported: unless it is known already, the stream ends with the chunks that have arrived."""
        if self._total is None:
            self._has_ended = True  # later chunks are ignored, and do not mean that chunks were lost
            self.end_after(self._num_received)

    async def take(self, num_taken: int, late_s: float) -> list[bytes]:
        """Wait for chunks after the first ``num_taken`` and return them; an empty list at the end.

        Raises:
            ChunksLost: the total is known, and the missing chunks did not come within ``late_s``, or too many came.
        """
        while not self._chunks and (self._total is None or num_taken < self._total):
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), None if self._total is None else late_s)
            except TimeoutError as error:
                raise ChunksLost(f"of {self._total} chunks {num_taken} came") from error
        taken, self._chunks = self._chunks, []
        if self._total is not None and num_taken + len(taken) > self._total:
            raise ChunksLost(f"of {self._total} chunks {num_taken + len(taken)} came")
        return taken


class Receiver:
    """The proxy's end of the bypass, for all fronts of its host. Create it in a running event loop.

    Raises:
        SocketUnavailable: no socket could be bound.
    """

    def __init__(self) -> None:
        with contextlib.ExitStack() as undone:
            try:
                self._folder = PrivateFolder()
                undone.callback(self._folder.close)
                self.address = self._folder.socket("bypass")
                self._socket = undone.enter_context(shared_context().socket(zmq.PULL))
                self._socket.bind(self.address)
            except (OSError, ValueError, zmq.ZMQError) as error:
                raise SocketUnavailable(str(error)) from error
            undone.pop_all()
        self._numbers = itertools.count()
        self._streams: dict[int, IncomingStream] = {}
        self._task = asyncio.get_running_loop().create_task(self._receive(), name="bypass")
        self._task.add_done_callback(self._clear_away)

    @property
    def is_over(self) -> bool:
        """Whether it has stopped receiving: it was closed, or it failed."""
        return self._task.done()

    def open(self) -> IncomingStream:
        """Register a new stream."""
        number = next(self._numbers)
        stream = IncomingStream(number, lambda: self._forget(number))
        self._streams[number] = stream
        return stream

    def _forget(self, number: int) -> None:
        self._streams.pop(number, None)

    async def _receive(self) -> None:
        while True:
            message = await self._socket.recv()
            try:
                answers, chunks = _decode(message)
                arrived = list(zip(answers, chunks, strict=True))
            except (msgspec.MsgspecError, ValueError):
                logger.exception("a message on the bypass cannot be read")  # the streams whose chunks it held notice at their ends
                continue
            for answer, chunk in arrived:
                if (stream := self._streams.get(answer >> NONCE_BITS)) is not None:  # otherwise its client has left
                    stream.put(answer, chunk)

    def _clear_away(self, task: asyncio.Task[None]) -> None:
        """Close the socket, whatever ended the task, so that fronts notice at once that nobody listens."""
        self._socket.close(linger=0)
        self._folder.close()
        if not task.cancelled():
            logger.error("the bypass has ended; the streams on it break off", exc_info=task.exception())

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
