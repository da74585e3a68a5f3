"""The bypass: chunks of a streamed response go from a front to the proxy on the same host over a socket, not through Ray.

For each request the proxy adds a header with its node, the number of the stream and the address of its socket (`cluster.bypass`). The
beginning and the end of the response still go through Ray, and so do whole responses of fronts on other hosts, which cannot reach the
socket. The beginning announces that chunks come over the socket; the end says how many there were. Whenever something is not as it
should be, streams go through Ray.

This module is what both protocols share; `serve.http.bypass` and `serve.grpc.bypass` use it.
"""

import asyncio
import logging
from dataclasses import dataclass

from cluster.bypass import IncomingStream, Receiver, Sender, SocketUnavailable, new_answer_number, socket_exists
from cluster.channel import shared_context

logger = logging.getLogger(__name__)

HEADER = "x-manta-bypass"
"""Set by the proxy: "NODE STREAM ADDRESS". Not for clients: they know no node."""
LATE_S = 10.0
"""How long to wait for chunks after the end is known; a message within a host takes far less than a millisecond."""
PAUSE_S = 60.0
"""How long streams go through Ray after something went wrong at a proxy."""


class ProxyEndpoint:
    """The proxy's end: receives chunks for both of its servers. Belongs to one event loop."""

    def __init__(self, node: str) -> None:
        """``node``: Ray's id of the proxy's host."""
        self._node = node
        self._receiver: Receiver | None = None
        shared_context()
        self._paused_until = float("-inf")

    def open(self) -> IncomingStream | None:
        """The receiving end of a new stream; None if the stream must go through Ray."""
        receiver = self._open_receiver()
        return None if receiver is None else receiver.open()

    def header_value(self, incoming: IncomingStream) -> str:
        """The value of `HEADER` for the request whose stream was just opened."""
        assert self._receiver is not None
        return f"{self._node} {incoming.number} {self._receiver.address}"

    def pause(self, why: str) -> None:
        """Send streams through Ray for `PAUSE_S`."""
        now = asyncio.get_running_loop().time()
        if now >= self._paused_until:  # streams that are lost together are reported once
            logger.warning("the bypass failed, streams go through Ray for %g s: %s", PAUSE_S, why)
            self._paused_until = now + PAUSE_S

    def _open_receiver(self) -> Receiver | None:
        """The receiver, made for the first request; None while the bypass is paused."""
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
class BypassStream:
    """Sends the chunks of one response to its proxy."""

    sender: Sender
    answer: int
    """The response's number (`cluster.bypass.new_answer_number`)."""

    def put(self, chunk: bytes) -> None:
        """Send a chunk.

        Raises:
            ChunksLost: see `Sender.put`.
        """
        self.sender.put(self.answer, chunk)


class FrontEndpoint:
    """The front's end: one sender for each proxy that can be reached. Belongs to one event loop."""

    def __init__(self, node: str) -> None:
        """``node``: Ray's id of the front's host."""
        self._node = node
        self._senders: dict[str, Sender] = {}
        """By the address of the proxy's socket."""
        self._obstacle: str | None = None
        """Why streams go through Ray although the proxy is on this host; logged once, until the bypass works again."""

    def stream_for(self, headers: list[str]) -> BypassStream | None:
        """The stream for a request, by its values of `HEADER`; None if its response must go through Ray.

        The proxy sets exactly one.
        """
        return self._stream(headers[0]) if len(headers) == 1 else None

    def _stream(self, header: str) -> BypassStream | None:
        node, _, rest = header.partition(" ")
        number, _, address = rest.partition(" ")
        if node != self._node:
            return None
        if not socket_exists(address):
            self._warn(f"{address} is not visible from this container")
            return None
        try:
            stream = BypassStream(self._sender(address), new_answer_number(int(number)))
        except (SocketUnavailable, ValueError) as error:
            self._warn(str(error))
            return None
        if not stream.sender.is_connected:  # usually the first request of a proxy
            return None
        self._obstacle = None
        return stream

    def _sender(self, address: str) -> Sender:
        """The sender for an address, replaced if its connection is lost. Closes the senders of proxies that are gone.

        Raises:
            SocketUnavailable: none can be opened.
        """
        sender = self._senders.get(address)
        if sender is None or sender.is_lost:
            if sender is not None:
                self._warn(f"{address} does not take connections or messages")
            for old in [old for old, sender in self._senders.items() if sender.is_lost]:
                self._senders.pop(old).close()
            sender = self._senders[address] = Sender(address)
        return sender

    def _warn(self, obstacle: str) -> None:
        if obstacle != self._obstacle:
            logger.warning("streams go to this host's proxy by Ray: %s", obstacle)
        self._obstacle = obstacle
