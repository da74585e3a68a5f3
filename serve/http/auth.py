"""Place 2 of a request over HTTP: every path but the two probes needs a key, and every response says what is left of its quotas."""

from collections.abc import Callable, Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.auth import Authenticator
from serve.caller import ANONYMOUS, Caller
from serve.caller import Scope as KeyScope
from serve.errors import NotAuthenticated
from serve.http.boundary import ERROR_HEADERS

OPEN_PATHS = frozenset({"/livez", "/readyz"})
"""For probes, which have no keys. All other paths need one, including those that do not exist."""
SCOPES: Mapping[str, KeyScope] = {"/metrics": KeyScope.METRICS, "/tokenize": KeyScope.INFER, "/detokenize": KeyScope.INFER}
SCOPES_BELOW: Mapping[str, KeyScope] = {"/v1/": KeyScope.INFER, "/admin/": KeyScope.ADMIN}
"""The scope that a key needs, by path and by prefix; a path in neither table takes any key."""
CALLER = "manta.caller"
"""Key of the `Caller` in an ASGI scope."""


class AuthMiddleware:
    """ASGI middleware. It decides by ``scope["path"]``, which is also what the router matches."""

    def __init__(
        self, app: ASGIApp, *, authenticator: Callable[[], Authenticator], quota_headers: Callable[[Caller], Mapping[str, str]]
    ) -> None:
        """``authenticator`` is called for each request: it is made after the app, in the process that serves."""
        self._app, self._authenticator, self._quota_headers = app, authenticator, quota_headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        credentials = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"authorization"]
        try:
            caller = self._authenticator().authenticate(credentials, required_scope(scope["path"]))
        except NotAuthenticated:
            scope[ERROR_HEADERS] = {"www-authenticate": "Bearer"}
            raise

        async def send_with_quota(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._quota_headers(caller))
            await send(message)

        try:
            await self._app({**scope, CALLER: caller}, receive, send_with_quota)
        except Exception:
            scope[ERROR_HEADERS] = dict(self._quota_headers(caller))
            raise


def required_scope(path: str) -> KeyScope | None:
    return SCOPES.get(path) or next((scope for prefix, scope in SCOPES_BELOW.items() if path.startswith(prefix)), None)


def caller_of(scope: Scope) -> Caller:
    caller = scope.get(CALLER, ANONYMOUS)
    assert isinstance(caller, Caller)
    return caller
