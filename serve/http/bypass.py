"""Streams past Ray: the proxy tells each request where its front may send pieces of the answer (`cluster.bypass`), and both ends as ASGI.

What begins and ends an answer goes by Ray as ever, and so do answers of fronts on other hosts, which cannot reach the socket. The
beginning says that pieces come the other way, the end how many there were.
"""

import asyncio
import contextlib
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.bypass import Receiver, Sender, is_here

HEADER = b"x-manta-bypass"
"""Set by the proxy: its node, the number of the stream, the socket's address. Not for clients: they know no node."""
WAY = "manta.bypass"
"""In a front's scope: the `Way`, if there is one."""
PASSED = "manta_bypassed"
"""In a message: of the first True, of the last how many pieces there were."""
LATE_S = 10.0
"""After the end is known; a message within a host takes far less than a millisecond."""


@dataclass(frozen=True)
class Way:
    """For one answer's pieces."""

    sender: Sender
    stream: int

    def put(self, piece: bytes) -> None:
        """
        Raises:
            PiecesLost: see `Sender.put`.
        """
        self.sender.put(self.stream, piece)


class ProxyBypass:
    """Before Ray Serve's proxy: hands on what comes by the socket as if it had come by Ray."""

    def __init__(self, app: ASGIApp, *, node: str) -> None:
        self._app, self._node = app, node.encode()
        self._receiver: Receiver | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        self._receiver = self._receiver or Receiver()
        passage = self._receiver.open()
        pump: asyncio.Task[None] | None = None
        header = b"%s %d %s" % (self._node, passage.number, self._receiver.address.encode())

        async def hand_on() -> None:
            num_taken = 0
            while pieces := await passage.take(num_taken, LATE_S):
                num_taken += len(pieces)
                await send({"type": "http.response.body", "body": b"".join(pieces), "more_body": True})

        async def send_in_order(message: Message) -> None:
            nonlocal pump
            passed = message.pop(PASSED, None)
            if passed is not None and pump is not None:
                passage.end_after(passed)
                await pump
            await send(message)
            if passed is not None and pump is None:
                pump = asyncio.create_task(hand_on())

        try:
            await self._app({**scope, "headers": [*scope["headers"], (HEADER, header)]}, receive, send_in_order)
        finally:
            passage.close()
            if pump is not None:
                pump.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):  # what it raised was raised to whoever sent the end
                    await pump


class FrontBypass:
    """Before a front: whether there is a way for the pieces of an answer."""

    def __init__(self, app: ASGIApp, *, node: str) -> None:
        self._app, self._node = app, node
        self._senders: dict[str, Sender] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            told = [value for name, value in scope["headers"] if name == HEADER]
            kept = [(name, value) for name, value in scope["headers"] if name != HEADER]
            scope = {**scope, "headers": kept, WAY: self._way(told[0].decode("latin-1")) if len(told) == 1 else None}
        await self._app(scope, receive, send)

    def _way(self, told: str) -> Way | None:
        node, _, rest = told.partition(" ")
        stream, _, address = rest.partition(" ")
        if node != self._node or not is_here(address):
            return None
        sender = self._senders.get(address)
        if sender is None or not sender.leads_somewhere:  # a proxy's first request
            sender = self._instead_of_lost(address)
        return Way(sender, int(stream))

    def _instead_of_lost(self, address: str) -> Sender:
        """A new sender; those to proxies that are gone are closed."""
        for old in [old for old, sender in self._senders.items() if old == address or not sender.leads_somewhere]:
            self._senders.pop(old).close()
        self._senders[address] = Sender(address)
        return self._senders[address]
