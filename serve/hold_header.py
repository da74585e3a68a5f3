"""Tells a client how long its request was held until a replica had started: a header over HTTP, trailing metadata over gRPC."""

HOLD_HEADER = "x-manta-held-ms"
LEAST_S = 0.05
"""Shorter waits are not reported."""


def hold_headers(held_s: float) -> dict[str, str]:
    return {HOLD_HEADER: str(round(held_s * 1000))} if held_s >= LEAST_S else {}
