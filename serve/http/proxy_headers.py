"""What Ray Serve's HTTP proxies do to a request before they route it, by our word."""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

NOT_FOR_CLIENTS = frozenset({b"x-request-disconnect-disabled"})
"""Headers by which Ray Serve lets itself be told that a client's going need not be noticed: its tokens would be made for nobody."""


class StrippedHeaders:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0].lower() not in NOT_FOR_CLIENTS]}
        await self._app(scope, receive, send)


def proxy_middlewares() -> list[Middleware]:
    return [Middleware(StrippedHeaders)]
