"""Step 14 of a request, on its way to the proxy: pieces of streams pass from a front to a proxy of its host by a socket of their own.

Ray would carry each piece of each stream by itself, at about a millisecond of CPU on both sides together. Here a message holds whatever
is ready at once, as a rule a step's tokens of all streams of a front.
"""

import asyncio
import itertools
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec
import zmq
import zmq.asyncio

from cluster.channel import PrivateFolder

logger = logging.getLogger(__name__)

MAX_QUEUED_MESSAGES = 10_000
"""To one proxy; one that does not read so many is given up."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[list[int], list[bytes]]).decode


class PiecesLost(Exception):
    """What was sent did not all come."""


class Sender:
    """A front's end of one proxy's bypass. Belongs to one event loop."""

    def __init__(self, address: str) -> None:
        self._address = address
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._socket = context.socket(zmq.PUSH)  # whoever drops a context of its own waits until its sockets are closed
        self._socket.linger = 1000
        self._socket.sndhwm = MAX_QUEUED_MESSAGES
        self._socket.reconnect_ivl = -1  # a proxy that is started again listens elsewhere
        self._socket.connect(address)
        self._streams: list[int] = []
        self._pieces: list[bytes] = []
        self._is_broken = False

    @property
    def leads_somewhere(self) -> bool:
        """Whether all has gone well so far, and the socket is still there."""
        return not self._is_broken and is_here(self._address)

    def put(self, stream: int, piece: bytes) -> None:
        """Goes with all that is put until the loop has come round.

        Raises:
            PiecesLost: something that was put before did not go, maybe of another stream.
        """
        if self._is_broken:
            raise PiecesLost("the proxy does not take pieces of streams any more")
        if not self._streams:
            asyncio.get_running_loop().call_soon(self._flush)
        self._streams.append(stream)
        self._pieces.append(piece)

    def _flush(self) -> None:
        streams, self._streams = self._streams, []
        pieces, self._pieces = self._pieces, []
        try:
            self._socket.send(_encode((streams, pieces)), zmq.NOBLOCK)
        except zmq.ZMQError:  # nobody is there any more, or stands still behind a full queue
            self._is_broken = True

    def close(self) -> None:
        self._is_broken = True
        self._socket.close()


def is_here(address: str) -> bool:
    """Whether a socket is in this process's file system: a front in a container of its own may not see that of a proxy of its host."""
    return os.path.exists(address.removeprefix("ipc://"))


@dataclass
class Passage:
    """What has come of one stream."""

    number: int
    close: Callable[[], None]
    _pieces: list[bytes] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _total: int | None = None

    def put(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._news.set()

    def end_after(self, total: int) -> None:
        """So many pieces were sent in all."""
        self._total = total
        self._news.set()

    async def take(self, num_taken: int, late_s: float) -> list[bytes]:
        """What has come since ``num_taken`` pieces were taken, waiting for it; nothing at the end.

        Raises:
            PiecesLost: the end is known, and what is missing did not come within ``late_s``.
        """
        while not self._pieces and num_taken != self._total:
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), None if self._total is None else late_s)
            except TimeoutError as error:
                raise PiecesLost(f"of {self._total} pieces {num_taken} came") from error
        taken, self._pieces = self._pieces, []
        return taken


class Receiver:
    """A proxy's end, for the fronts of its host. Must be made in a running event loop."""

    def __init__(self) -> None:
        self._folder = PrivateFolder()
        self.address = self._folder.socket("bypass")
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PULL)
        self._socket.bind(self.address)
        self._numbers = itertools.count()
        self._passages: dict[int, Passage] = {}
        self._task = asyncio.get_running_loop().create_task(self._receive(), name="bypass")

    def open(self) -> Passage:
        """For a new stream."""
        number = next(self._numbers)
        passage = Passage(number, lambda: self._forget(number))
        self._passages[number] = passage
        return passage

    def _forget(self, number: int) -> None:
        self._passages.pop(number, None)

    async def _receive(self) -> None:
        while True:
            try:
                streams, pieces = _decode(await self._socket.recv())
                arrived = list(zip(streams, pieces, strict=True))
            except (msgspec.MsgspecError, ValueError):
                logger.exception("a message on the bypass cannot be read")  # whose pieces it held is seen at the ends of their streams
                continue
            for stream, piece in arrived:
                if (passage := self._passages.get(stream)) is not None:  # else its client has left
                    passage.put(piece)

    async def close(self) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._socket.close(linger=0)
        self._folder.close()
