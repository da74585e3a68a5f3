"""Streams past Ray, of either protocol: what a proxy holds for the fronts of its host, and a front for the proxies, one socket to each.

The proxy tells each request, in a header of its own, its node, the number of the stream and where pieces of the answer may be sent
(`cluster.bypass`). What begins and ends an answer goes by Ray as ever, and so do answers of fronts on other hosts, which cannot reach the
socket. The beginning says which pieces come the other way, the end how many there were. Where anything is not as it should be, streams go
by Ray.
"""

import asyncio
import logging
from dataclasses import dataclass

from cluster.bypass import IncomingStream, Receiver, Sender, SocketUnavailable, new_answer_number, socket_exists
from cluster.channel import shared_context

logger = logging.getLogger(__name__)

HEADER = "x-manta-bypass"
"""Set by the proxy. Not for clients: they know no node."""
LATE_S = 10.0
"""For pieces, after the end is known; a message within a host takes far less than a millisecond."""
PAUSE_S = 60.0
"""Streams go by Ray for so long after something went wrong at a proxy's end."""


class Passages:
    """A proxy's end, for both of its servers. Belongs to one event loop."""

    def __init__(self, node: str) -> None:
        """``node`` is Ray's name of the proxy's host."""
        self._node = node
        self._receiver: Receiver | None = None
        shared_context()
        self._paused_until = float("-inf")

    def open(self) -> IncomingStream | None:
        """For a new stream; None where it shall go by Ray."""
        receiver = self._receiving()
        return None if receiver is None else receiver.open()

    def told(self, passage: IncomingStream) -> str:
        """The header for the request of a stream that was just opened."""
        assert self._receiver is not None
        return f"{self._node} {passage.number} {self._receiver.address}"

    def pause(self, why: str) -> None:
        """Name no socket for a while."""
        now = asyncio.get_running_loop().time()
        if now >= self._paused_until:  # streams that are lost together are one mishap
            logger.warning("the bypass failed, streams go by Ray for %g s: %s", PAUSE_S, why)
            self._paused_until = now + PAUSE_S

    def _receiving(self) -> Receiver | None:
        """What fronts may send to, made for the first request. None while that is not to be relied on."""
        if self._receiver is not None and self._receiver.is_over:
            self._receiver = None
            self.pause("the receiver has ended")
        if asyncio.get_running_loop().time() < self._paused_until:
            return None
        try:
            self._receiver = self._receiver or Receiver()
        except SocketUnavailable as error:
            self.pause(str(error))
        return self._receiver


@dataclass(frozen=True)
class Way:
    """For one answer's pieces."""

    sender: Sender
    answer: int

    def put(self, piece: bytes) -> None:
        """
        Raises:
            PiecesLost: see `Sender.put`.
        """
        self.sender.put(self.answer, piece)


class Ways:
    """A front's end: whether there is a way for the pieces of an answer. Belongs to one event loop."""

    def __init__(self, node: str) -> None:
        """``node`` is Ray's name of the front's host."""
        self._node = node
        self._senders: dict[str, Sender] = {}
        self._obstacle: str | None = None
        """Why answers go by Ray that need not; said once, until one goes past it again."""

    def as_told(self, headers: list[str]) -> Way | None:
        """By the headers of a request that have the name for it; the proxy sets one."""
        return self._way(headers[0]) if len(headers) == 1 else None

    def _way(self, told: str) -> Way | None:
        node, _, rest = told.partition(" ")
        stream, _, address = rest.partition(" ")
        if node != self._node:
            return None
        if not socket_exists(address):
            self._say(f"{address} is not to be seen from here")
            return None
        try:
            way = Way(self._sender(address), new_answer_number(int(stream)))
        except (SocketUnavailable, ValueError) as error:
            self._say(str(error))
            return None
        if not way.sender.is_connected:  # as a rule a proxy's first request
            return None
        self._obstacle = None
        return way

    def _sender(self, address: str) -> Sender:
        """The one to an address, anew where it is lost; those to proxies that are gone are closed. Raises SocketUnavailable."""
        sender = self._senders.get(address)
        if sender is None or sender.is_lost:
            if sender is not None:
                self._say(f"{address} does not take connections or messages")
            for old in [old for old, sender in self._senders.items() if sender.is_lost]:
                self._senders.pop(old).close()
            sender = self._senders[address] = Sender(address)
        return sender

    def _say(self, obstacle: str) -> None:
        if obstacle != self._obstacle:
            logger.warning("streams go to this host's proxy by Ray: %s", obstacle)
        self._obstacle = obstacle
