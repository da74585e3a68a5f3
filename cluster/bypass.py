"""Step 14 of a request, on its way to the proxy: pieces of streams pass from a front to a proxy of its host by a socket of their own.

Ray would carry each piece of each stream by itself, at about a millisecond of CPU on both sides together. Here a message holds whatever
is ready at once, as a rule a step's tokens of all streams of a front.
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
"""A message that has grown to this goes at once, so none is longer by more than a piece, but where a proxy stood still."""
MAX_QUEUED_BYTES = 64 << 20
"""To one proxy, as messages of that size. What comes after that waits until there is room, and goes together."""
MAX_WAITING_BYTES = 192 << 20
"""A proxy behind which more would wait is given up."""
LOOK_S = 0.1
"""How often it is looked whether there is room again, or nobody any more."""
MAX_STILL_S = 60.0
"""Somebody who listens and takes nothing stands still, for no longer than this: a connection that was lost is not made again."""
CONNECT_S = 5.0
"""A connection within a host takes milliseconds; one that did not come about in this time is tried anew."""
NONCE_BITS = 24

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[list[int], list[bytes]]).decode


class PiecesLost(Exception):
    """What was sent did not all come."""


class SocketUnavailable(Exception):
    """This process can make no socket for its end; the message says why."""


def new_answer_number(stream: int) -> int:
    """A number for one answer to a stream's request: Ray may send a request to another front while a first one still writes."""
    return stream << NONCE_BITS | secrets.randbits(NONCE_BITS)


class Sender:
    """A front's end of one proxy's bypass. Belongs to one event loop.

    Raises:
        SocketUnavailable: none can be connected to that address.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        with contextlib.ExitStack() as undone:
            try:
                self._socket: zmq.Socket[bytes] = undone.enter_context(zmq.Socket(shared_context(), zmq.PUSH))
                self._socket.linger = 1000
                self._socket.sndhwm = MAX_QUEUED_BYTES // MESSAGE_BYTES
                self._socket.immediate = True  # else messages wait for a connection that may never be
                self._socket.reconnect_ivl = -1  # a proxy that is started again listens elsewhere
                self._socket.connect(address)
            except zmq.ZMQError as error:
                raise SocketUnavailable(f"{address}: {error}") from error
            undone.pop_all()
        self._patient_until = time.monotonic() + CONNECT_S
        self._answers: list[int] = []
        self._pieces: list[bytes] = []
        self._num_bytes = 0
        self._go_at_bytes = MESSAGE_BYTES
        self._is_broken = self._was_connected = False
        self._still_since: float | None = None

    @property
    def is_connected(self) -> bool:
        """Whether a message would go now."""
        return not self._is_broken and bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLOUT)

    @property
    def is_lost(self) -> bool:
        """Whether nothing will come of it any more."""
        if self._is_broken or not socket_exists(self._address):
            return True
        if self.is_connected:
            self._was_connected, self._still_since = True, None
            return False
        return not self._may_stand_still() if self._was_connected else time.monotonic() > self._patient_until

    def put(self, answer: int, piece: bytes) -> None:
        """Goes with all that is put until the loop has come round, or until there is much of it.

        Raises:
            PiecesLost: something that was put before did not go, maybe of another stream.
        """
        if self._is_broken:
            raise PiecesLost("the proxy does not take pieces of streams any more")
        if not self._answers:
            asyncio.get_running_loop().call_soon(self._flush)
        self._answers.append(answer)
        self._pieces.append(piece)
        self._num_bytes += len(piece)
        if self._num_bytes >= self._go_at_bytes:
            self._flush()

    def _flush(self) -> None:
        """A proxy that stands still is waited for: it takes as many messages as there were steps, whatever they hold."""
        if not self._answers or self._is_broken:  # it went because there was much of it
            return
        if not self.is_connected and self._num_bytes < MAX_WAITING_BYTES and self._may_stand_still():
            self._was_connected, self._go_at_bytes = True, MAX_WAITING_BYTES
            asyncio.get_running_loop().call_later(LOOK_S, self._flush)
            return
        self._still_since = None
        answers, self._answers = self._answers, []
        pieces, self._pieces = self._pieces, []
        self._num_bytes, self._go_at_bytes = 0, MESSAGE_BYTES
        try:
            self._socket.send(_encode((answers, pieces)), zmq.NOBLOCK)
        except zmq.ZMQError:  # nobody is there any more, or it has stood still for too long
            self._is_broken = True

    def _may_stand_still(self) -> bool:
        """Whether somebody who takes nothing now may take it later."""
        self._still_since = self._still_since or time.monotonic()
        return time.monotonic() - self._still_since < MAX_STILL_S and is_listening(self._address)

    def close(self) -> None:
        self._is_broken = True
        self._socket.close()


def socket_exists(address: str) -> bool:
    """Whether a socket is in this process's file system: a front in a container of its own may not see that of a proxy of its host."""
    return address.startswith("ipc://") and os.path.exists(address.removeprefix("ipc://"))


def is_listening(address: str) -> bool:
    """Whether somebody listens at a socket of this host, even if he stands still: the kernel refuses for a process that is gone."""
    try:
        probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError:  # without a file descriptor nobody can be asked
        return True
    with probe:
        probe.setblocking(False)
        try:
            probe.connect(address.removeprefix("ipc://"))
        except BlockingIOError:  # more have knocked than he has let in
            return True
        except OSError:
            return False
        return True


@dataclass
class IncomingStream:
    """What has come for one stream: until it is known which answer to its request is the one, of all that are written."""

    number: int
    close: Callable[[], None]
    _answer: int | None = None
    _early: dict[int, list[bytes]] = field(default_factory=dict)
    _pieces: list[bytes] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _num_come: int = 0
    _is_over: bool = False
    _total: int | None = None

    def put(self, answer: int, piece: bytes) -> None:
        if answer == self._answer and not self._is_over:
            self._pieces.append(piece)
            self._num_come += 1
            self._news.set()
        elif self._answer is None:
            self._early.setdefault(answer, []).append(piece)

    def begin(self, answer: int) -> None:
        """Its pieces are taken, and those of no other."""
        self._answer, self._pieces = answer, self._early.pop(answer, [])
        self._num_come = len(self._pieces)
        self._early.clear()

    def end_after(self, total: int) -> None:
        """So many pieces were sent in all."""
        self._total = total
        self._news.set()

    def end_here(self) -> None:
        """No end will be told any more: what has come is all there is, unless the end is known."""
        if self._total is None:
            self._is_over = True  # what comes late belongs to nobody, and is no sign that pieces are lost
            self.end_after(self._num_come)

    async def take(self, num_taken: int, late_s: float) -> list[bytes]:
        """What has come since ``num_taken`` pieces were taken, waiting for it; nothing at the end.

        Raises:
            PiecesLost: the end is known, and what is missing did not come within ``late_s``, or more came.
        """
        while not self._pieces and (self._total is None or num_taken < self._total):
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), None if self._total is None else late_s)
            except TimeoutError as error:
                raise PiecesLost(f"of {self._total} pieces {num_taken} came") from error
        taken, self._pieces = self._pieces, []
        if self._total is not None and num_taken + len(taken) > self._total:
            raise PiecesLost(f"of {self._total} pieces {num_taken + len(taken)} came")
        return taken


class Receiver:
    """A proxy's end, for the fronts of its host. Must be made in a running event loop.

    Raises:
        SocketUnavailable: none can be bound.
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
        self._passages: dict[int, IncomingStream] = {}
        self._task = asyncio.get_running_loop().create_task(self._receive(), name="bypass")
        self._task.add_done_callback(self._clear_away)

    @property
    def is_over(self) -> bool:
        """Whether it has ended, which nobody wanted unless it was closed."""
        return self._task.done()

    def open(self) -> IncomingStream:
        """For a new stream."""
        number = next(self._numbers)
        passage = IncomingStream(number, lambda: self._forget(number))
        self._passages[number] = passage
        return passage

    def _forget(self, number: int) -> None:
        self._passages.pop(number, None)

    async def _receive(self) -> None:
        while True:
            message = await self._socket.recv()
            try:
                answers, pieces = _decode(message)
                arrived = list(zip(answers, pieces, strict=True))
            except (msgspec.MsgspecError, ValueError):
                logger.exception("a message on the bypass cannot be read")  # whose pieces it held is seen at the ends of their streams
                continue
            for answer, piece in arrived:
                if (passage := self._passages.get(answer >> NONCE_BITS)) is not None:  # else its client has left
                    passage.put(answer, piece)

    def _clear_away(self, task: asyncio.Task[None]) -> None:
        """Without the socket fronts see at once that nobody listens, however it came to that."""
        self._socket.close(linger=0)
        self._folder.close()
        if not task.cancelled():
            logger.error("the bypass has ended; the streams on it break off", exc_info=task.exception())

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
