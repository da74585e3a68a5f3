"""Place 1 of a request over gRPC: bytes that are not a protobuf message become an error like every other.

gRPC decodes a message before it calls the handler. If that fails, it answers UNKNOWN with the text of protobuf's exception. So
undecodable bytes become an object that raises our error when the handler reads a field, where errors are handled anyway.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from serve.errors import InvalidRequest


class UndecodableMessage:
    """Stands for a message. Reading any field raises `InvalidRequest`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling look for these
            raise AttributeError(name)
        raise InvalidRequest("the request is not a message of manta.v1: its bytes cannot be decoded as protobuf")


def catch_decode_errors(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    """The handler, which gets an `UndecodableMessage` for bytes that it cannot decode."""
    decode = handler.request_deserializer
    return handler if decode is None else handler._replace(request_deserializer=lambda raw: _decode(decode, raw))


class DecodeErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """`catch_decode_errors` for every handler of a plain server."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]], details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(details)
        return handler if handler is None or not details.method.startswith("/manta.v1.") else catch_decode_errors(handler)


def _decode(decode: Callable[[bytes], Any], raw: bytes) -> Any:
    try:
        return decode(raw)
    except DecodeError:
        return UndecodableMessage()
