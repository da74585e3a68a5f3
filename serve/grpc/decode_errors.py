"""Step 1 of a request over gRPC, for bytes that are no message: the client's mistake, said as every other.

gRPC reads a message before it calls anybody, and where that fails it answers UNKNOWN with the text of protobuf's exception.
So what cannot be read becomes a message that refuses whoever looks into it, where refusals are answered anyway.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from serve.errors import InvalidRequest


class Unreadable:
    """In place of a message."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copying and pickling ask for
            raise AttributeError(name)
        raise InvalidRequest("the request is no message of manta.v1: its bytes cannot be read as protobuf")


def forgiving(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    """The handler, with `Unreadable` for what it could not read."""
    strict = handler.request_deserializer
    return handler if strict is None else handler._replace(request_deserializer=lambda raw: _read(strict, raw))


class Forgiving(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """The same for every handler of a plain server."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]], details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(details)
        return handler if handler is None or not details.method.startswith("/manta.v1.") else forgiving(handler)


def _read(strict: Callable[[bytes], Any], raw: bytes) -> Any:
    try:
        return strict(raw)
    except DecodeError:
        return Unreadable()
