"""Step 1 of a request: which trace it is a part of, as the W3C's Trace Context has clients say it, in HTTP headers or gRPC metadata.

Nothing is judged here: what is no such context is left out by whoever makes spans (`serve.tracing`).
"""

from collections.abc import Iterable, Mapping

FIELDS = ("traceparent", "tracestate")


def trace_of(said: Iterable[tuple[str, str | bytes]]) -> Mapping[str, str]:
    """The fields of a trace among headers or metadata; of one that is there twice, which would be wrong, nothing."""
    found: dict[str, list[str]] = {}
    for name, value in said:
        if name.lower() in FIELDS:
            found.setdefault(name.lower(), []).append(value if isinstance(value, str) else value.decode("latin-1"))
    return {name: values[0] for name, values in found.items() if len(values) == 1}
