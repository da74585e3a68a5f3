"""The outermost middleware of the HTTP API: request ids, header limits, and a response for every error."""

import logging
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import HeadersTooLarge, InvalidRequest
from serve.http.disconnect import ClientDisconnected, with_disconnects
from serve.http.errors import error_response
from serve.limits import Limits, is_identifier

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
ERROR_HEADERS = "manta.error_headers"
"""Key in an ASGI scope of headers for the error response: inner middleware sets it before an exception passes."""


class RequestBoundary:
    """ASGI middleware. Before the response has started, it turns every exception into an error response. After that it lets exceptions
    pass, which cuts the connection, so that a broken response never looks complete."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        behind_ray: bool,
        disconnect_errors: tuple[type[Exception], ...],
        on_error: Callable[[BaseException], None],
    ) -> None:
        """``on_error``: told of each exception that becomes a response."""
        self._app, self._limits, self._disconnect_errors, self._on_error = app, limits, disconnect_errors, on_error
        self._sends_id = not behind_ray  # Ray Serve's proxy adds the same header itself

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id, started = f"req-{uuid.uuid4().hex}", False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if self._sends_id:
                    MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            self._check_size(scope)
            request_id = self._client_id(Headers(scope=scope)) or request_id
            await self._app(scope, with_disconnects(receive, self._disconnect_errors), send_with_id)
        except ClientDisconnected:
            logger.info("request %s: the client left", request_id)
        except Exception as error:
            if started:
                raise
            self._on_error(error)
            await error_response(error, headers=scope.get(ERROR_HEADERS))(scope, receive, send_with_id)

    def _check_size(self, scope: Scope) -> None:
        headers = scope["headers"]
        too_long = sum(len(name) + len(value) for name, value in headers) > self._limits.header_bytes
        if too_long or len(headers) > self._limits.headers:
            raise HeadersTooLarge(limit_bytes=self._limits.header_bytes, limit_headers=self._limits.headers)

    def _client_id(self, headers: Headers) -> str | None:
        """The id that the client gave this request, if any. It names the request in logs, never in the engine."""
        given = headers.get(REQUEST_ID)
        if given is not None and not is_identifier(given, self._limits):
            raise InvalidRequest(f"{REQUEST_ID} must be 1 to {self._limits.id_chars} of A-Z a-z 0-9 . _ : -", param=REQUEST_ID)
        return given
