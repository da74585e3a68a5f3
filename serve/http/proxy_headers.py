"""Middleware for Ray Serve's HTTP proxies: cleans the headers of a request before it is routed."""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.bypass import ProxyEndpoint
from serve.http.bypass import HEADER, ProxyBypass

NOT_FOR_CLIENTS = frozenset({b"x-request-disconnect-disabled", b"x-request-timeout-seconds", b"serve-multiplexed-model-id", HEADER})
"""Headers that only a trusted proxy may set. Three control Ray Serve: not to watch for a disconnect, when to answer 408 by itself, and
which replica to use. The fourth is the bypass's, by which this proxy tells a front where to send the chunks of a response."""
DECODED = frozenset({b"x-request-id", b"x-session-id", b"traceparent"})
"""Headers that Ray Serve decodes as UTF-8. Other bytes in them would make it answer with a 500 of its own."""


class ProxyHeaders:
    """Removes `NOT_FOR_CLIENTS`, and replaces every byte that is not ASCII in `DECODED` by a question mark.

    The front then refuses such an id, as it does without a proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            named = [(name, value, name.lower().replace(b"_", b"-")) for name, value in scope["headers"]]
            kept = [(name, _ascii(value) if known in DECODED else value) for name, value, known in named if known not in NOT_FOR_CLIENTS]
            scope = {**scope, "headers": kept}
        await self._app(scope, receive, send)


def proxy_middlewares(endpoint: ProxyEndpoint) -> list[Middleware]:
    """The last one in the list sees a request first."""
    return [Middleware(ProxyBypass, endpoint=endpoint), Middleware(ProxyHeaders)]


def _ascii(value: bytes) -> bytes:
    return value if value.isascii() else bytes(byte if byte < 128 else ord("?") for byte in value)
