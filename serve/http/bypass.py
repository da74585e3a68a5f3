"""Streams past Ray: the proxy tells each request where its front may send pieces of the answer (`cluster.bypass`), and both ends as ASGI.

What begins and ends an answer goes by Ray as ever, and so do answers of fronts on other hosts, which cannot reach the socket. The
beginning says which pieces come the other way, the end how many there were. Where anything is not as it should be, streams go by Ray.
"""

import asyncio
import contextlib
import logging
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.bypass import NoSocket, PiecesLost, Receiver, Sender, is_here, new_answer

logger = logging.getLogger(__name__)

HEADER = b"x-manta-bypass"
"""Set by the proxy: its node, the number of the stream, the socket's address. Not for clients: they know no node."""
WAY = "manta.bypass"
"""In a front's scope: the `Way`, if there is one."""
PASSED = "manta_bypassed"
"""In a message: of the first the answer's number (`new_answer`), of the last how many pieces there were."""
LATE_S = 10.0
"""After the end is known; a message within a host takes far less than a millisecond."""
PAUSE_S = 60.0
"""Streams go by Ray for so long after something went wrong at a proxy's end."""


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


class ProxyBypass:
    """Before Ray Serve's proxy: hands on what comes by the socket as if it had come by Ray."""

    def __init__(self, app: ASGIApp, *, node: str) -> None:
        self._app, self._node = app, node.encode()
        self._receiver: Receiver | None = None
        self._paused_until = float("-inf")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or (receiver := self._receiving()) is None:
            return await self._app(scope, receive, send)
        passage = receiver.open()
        pump: asyncio.Task[None] | None = None
        header = b"%s %d %s" % (self._node, passage.number, receiver.address.encode())

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
                try:
                    await pump
                except PiecesLost as lost:
                    self._pause(str(lost))
                    raise
            await send(message)
            if passed is not None and pump is None:
                passage.begin(passed)
                pump = asyncio.create_task(hand_on())

        try:
            await self._app({**scope, "headers": [*scope["headers"], (HEADER, header)]}, receive, send_in_order)
        finally:
            passage.close()
            if pump is not None:
                pump.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):  # what it raised was raised to whoever sent the end
                    await pump

    def _receiving(self) -> Receiver | None:
        """What fronts may send to, made for the first request. None while that is not to be relied on."""
        if self._receiver is not None and self._receiver.is_over:
            self._receiver = None
            self._pause("the receiver has ended")
        if asyncio.get_running_loop().time() < self._paused_until:
            return None
        try:
            self._receiver = self._receiver or Receiver()
        except NoSocket as error:
            self._pause(str(error))
        return self._receiver

    def _pause(self, why: str) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._paused_until:  # streams that are lost together are one mishap
            logger.warning("the bypass failed, streams go by Ray for %g s: %s", PAUSE_S, why)
            self._paused_until = now + PAUSE_S


class FrontBypass:
    """Before a front: whether there is a way for the pieces of an answer."""

    def __init__(self, app: ASGIApp, *, node: str) -> None:
        self._app, self._node = app, node
        self._senders: dict[str, Sender] = {}
        self._obstacle: str | None = None
        """Why answers go by Ray that need not; said once, until one goes past it again."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            told = [value for name, value in scope["headers"] if name == HEADER]
            kept = [(name, value) for name, value in scope["headers"] if name != HEADER]
            scope = {**scope, "headers": kept, WAY: self._way(told[0].decode("latin-1")) if len(told) == 1 else None}
        await self._app(scope, receive, send)

    def _way(self, told: str) -> Way | None:
        node, _, rest = told.partition(" ")
        stream, _, address = rest.partition(" ")
        if node != self._node:
            return None
        if not is_here(address):
            self._say(f"{address} is not to be seen from here")
            return None
        try:
            way = Way(self._sender(address), new_answer(int(stream)))
        except (NoSocket, ValueError) as error:
            self._say(str(error))
            return None
        if not way.sender.is_connected:  # as a rule a proxy's first request
            return None
        self._obstacle = None
        return way

    def _sender(self, address: str) -> Sender:
        """The one to an address, anew where it is lost; those to proxies that are gone are closed. Raises NoSocket."""
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
