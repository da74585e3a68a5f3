"""Place 14 of a request over gRPC: the trailers that say where its time went and how long it was held."""

from serve.grpc.errors import CallContext
from serve.hold_header import hold_headers
from serve.request_timing import RequestTiming

REQUEST_KEY = "x-manta-ledger"
"""Metadata of a call: "1" asks for the timing."""
TRAILER = "server-timing"


def set_timing_trailers(context: CallContext, timing: RequestTiming | None, held_s: float = 0.0) -> None:
    """Must be called before the last message: behind Ray Serve's proxy, trailers travel with messages.

    The timing is sent to those who ask for it, ``held_s`` to everyone.
    """
    trailers: list[tuple[str, str | bytes]] = [*hold_headers(held_s).items()]
    if timing is not None and (REQUEST_KEY, "1") in [(key, value) for key, value in context.invocation_metadata() or ()]:
        trailers.append((TRAILER, timing.server_timing()))
    if trailers:
        context.set_trailing_metadata(trailers)
