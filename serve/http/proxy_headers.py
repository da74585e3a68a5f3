"""What Ray Serve's HTTP proxies do to a request before they route it, by our word."""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.bypass import Passages
from serve.http.bypass import HEADER, ProxyBypass

NOT_FOR_CLIENTS = frozenset({b"x-request-disconnect-disabled", b"x-request-timeout-seconds", b"serve-multiplexed-model-id", HEADER})
"""Headers by which Ray Serve lets itself be told by whoever stands before it: that a client's going need not be noticed, when to answer
408 in its own words, and which replica to take. And where a front shall send the pieces of an answer, which this proxy tells it."""
DECODED = frozenset({b"x-request-id", b"x-session-id", b"traceparent"})
"""Headers whose value Ray Serve reads as UTF-8; one that is not would end in a 500 of its own."""


class ProxyHeaders:
    """Leaves out what is not for clients, and puts a question mark for each byte that is no ASCII where Ray Serve would stumble over it.

    Our front then refuses such an id, as it does without a proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            named = [(name, value, name.lower().replace(b"_", b"-")) for name, value in scope["headers"]]
            kept = [(name, _ascii(value) if known in DECODED else value) for name, value, known in named if known not in NOT_FOR_CLIENTS]
            scope = {**scope, "headers": kept}
        await self._app(scope, receive, send)


def proxy_middlewares(passages: Passages) -> list[Middleware]:
    """The last one sees a request first."""
    return [Middleware(ProxyBypass, passages=passages), Middleware(ProxyHeaders)]


def _ascii(value: bytes) -> bytes:
    return value if value.isascii() else bytes(byte if byte < 128 else ord("?") for byte in value)
