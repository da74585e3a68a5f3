"""Step 14 of a request, over gRPC: the trailer that tells where a request's time went, for who asks for it."""

from serve.grpc.errors import CallContext
from serve.hold_header import held_headers
from serve.request_timing import Ledger

WANTED = "x-manta-ledger"
"""Metadata of a call; "1" asks."""
TRAILER = "server-timing"


def tell_ledger(context: CallContext, ledger: Ledger | None, held_s: float = 0.0) -> None:
    """To be called before the last message: behind Ray Serve's proxy trailers travel with messages. A wait is told to everyone."""
    trailers: list[tuple[str, str | bytes]] = [*held_headers(held_s).items()]
    if ledger is not None and (WANTED, "1") in [(key, value) for key, value in context.invocation_metadata() or ()]:
        trailers.append((TRAILER, ledger.server_timing()))
    if trailers:
        context.set_trailing_metadata(trailers)
