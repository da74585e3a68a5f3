"""Step 2 of a request, over HTTP: a key for every path but two, and what quotas tell about it with each answer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.caller import ANYONE, Caller
from serve.caller import Scope as KeyScope
from serve.errors import NotAuthenticated
from serve.http.errors import error_response

OPEN_PATHS = frozenset({"/livez", "/readyz"})
"""For probes, which have no keys. All other paths need one, also those that do not exist."""
SCOPES: Mapping[str, KeyScope] = {"/metrics": KeyScope.METRICS, "/tokenize": KeyScope.INFER, "/detokenize": KeyScope.INFER}
SCOPES_BELOW: Mapping[str, KeyScope] = {"/v1/": KeyScope.INFER, "/admin/": KeyScope.ADMIN}
"""What a key must be good for; on the paths that are in neither table, any key will do."""
CALLER = "manta.caller"
"""Where the caller stands in an ASGI scope."""


class Admits(Protocol):
    """`serve.auth.Doorkeeper` is one."""

    def admit(self, credentials: Sequence[str], scope: KeyScope | None = None) -> Caller: ...


class Authorise:
    """ASGI middleware. It decides on ``scope["path"]``, which is what the routes below are found by."""

    def __init__(self, app: ASGIApp, *, door: Callable[[], Admits], quota_headers: Callable[[Caller], Mapping[str, str]]) -> None:
        """``door`` is asked at each request: it is made after the app, in the process that serves."""
        self._app, self._door, self._quota_headers = app, door, quota_headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        credentials = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"authorization"]
        try:
            caller = self._door().admit(credentials, needed(scope["path"]))
        except NotAuthenticated as refusal:
            return await error_response(refusal, headers={"www-authenticate": "Bearer"})(scope, receive, send)

        async def send_with_quota(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._quota_headers(caller))
            await send(message)

        await self._app({**scope, CALLER: caller}, receive, send_with_quota)


def needed(path: str) -> KeyScope | None:
    return SCOPES.get(path) or next((scope for prefix, scope in SCOPES_BELOW.items() if path.startswith(prefix)), None)


def caller_of(scope: Scope) -> Caller:
    caller = scope.get(CALLER, ANYONE)
    assert isinstance(caller, Caller)
    return caller
