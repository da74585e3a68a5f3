"""What a client is told of a wait for a replica to start: a header over HTTP, trailing metadata over gRPC."""

HELD = "x-manta-held-ms"
LEAST_S = 0.05
"""Shorter waits are not told."""


def held_headers(held_s: float) -> dict[str, str]:
    return {HELD: str(round(held_s * 1000))} if held_s >= LEAST_S else {}
