"""Place 1 of a request: the trace that it belongs to, by the W3C's Trace Context in HTTP headers or gRPC metadata.

Nothing is validated here: `serve.tracing`, which makes the spans, ignores an invalid context.
"""

from collections.abc import Iterable, Mapping

FIELDS = ("traceparent", "tracestate")


def extract_trace(headers: Iterable[tuple[str, str | bytes]]) -> Mapping[str, str]:
    """The trace fields among headers or metadata. A field that occurs twice, which is invalid, is left out."""
    found: dict[str, list[str]] = {}
    for name, value in headers:
        if name.lower() in FIELDS:
            found.setdefault(name.lower(), []).append(value if isinstance(value, str) else value.decode("latin-1"))
    return {name: values[0] for name, values in found.items() if len(values) == 1}
