"""Any method, path, headers and bytes: the front answers, or refuses in OpenAI's shape as the client's mistake.

Bodies made from the API's own document are in test_schemathesis.py.
"""

import asyncio
import json
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from serve.http.app import create_app
from tests.serve.bad_input.checks import says_little
from tests.serve.http.conftest import MODEL, ScriptedService

HANGS_AFTER_S = 60.0
SCRIPTED_PATHS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/"),
    *("/livez", "/readyz", "/health", "/version", "/openapi.json"),
)
"""What the scripted service can answer."""
KNOWN_HEADERS = (
    *("authorization", "content-type", "content-length", "content-encoding", "transfer-encoding", "accept", "host", "expect", "origin"),
    *("x-request-id", "x-session-id", "x-priority", "x-deadline-ms", "x-manta-ledger", "x-manta-bypass", "idempotency-key"),
    *("traceparent", "tracestate", "cookie"),
)
JSON_HEADER = (b"content-type", b"application/json")
GOOD = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "stream": True}).encode()

some_bytes = st.one_of(
    st.binary(max_size=40), st.sampled_from([b"", b"0", b"-1", b"9" * 5_000, b"\xff\xfe", b"a\r\nx: y", b"\xc2\xb2", b"*"])
)
headers = st.lists(
    st.tuples(
        st.one_of(st.sampled_from(KNOWN_HEADERS).map(str.encode), st.binary(min_size=1, max_size=20).map(bytes.lower)),
        some_bytes,
    ),
    max_size=8,
)
json_body = st.one_of(headers, headers.map(lambda given: [JSON_HEADER, *given]))
methods = st.one_of(
    st.sampled_from(["GET", "POST", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW"]),
    st.text("ABCDEFGHIJ", min_size=1, max_size=10),
)
paths = st.one_of(
    st.sampled_from(SCRIPTED_PATHS),
    st.builds("{}{}".format, st.sampled_from(SCRIPTED_PATHS), st.text(max_size=10)),
    st.text(max_size=30).map("/{}".format),
)


@st.composite
def bodies(draw: st.DrawFn) -> list[bytes]:
    """A good one, cut, changed or of nothing but noise, in pieces."""
    raw = draw(st.one_of(st.just(GOOD), st.binary(max_size=100)))
    if draw(st.booleans()):
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.binary(max_size=5)) + raw[at + draw(st.integers(0, 5)) :]
    cut = draw(st.integers(0, len(raw)))
    return [raw[:cut], raw[cut:]]


async def ask(app: Any, scope: dict[str, Any], body: list[bytes]) -> list[dict[str, Any]]:
    """What a server would be given to send."""
    pieces = [{"type": "http.request", "body": piece, "more_body": place < len(body) - 1} for place, piece in enumerate(body)]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if pieces:
            return pieces.pop(0)
        await asyncio.Event().wait()  # the client stays
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async with asyncio.timeout(HANGS_AFTER_S):
        await app(scope, receive, send)
    return sent


def test_any_request_is_answered_or_refused() -> None:
    service, seen = ScriptedService(), Counter[int]()
    app = create_app(lambda: service)

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(methods, paths, json_body, bodies(), st.binary(max_size=20))
    @example("GET", "/livez", [], [b""], b"")  # what is drawn may happen to have nothing that is good
    def one(method: str, path: str, headers: list[tuple[bytes, bytes]], body: list[bytes], query: bytes) -> None:
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": path,
            "raw_path": path.encode(errors="replace"), "query_string": query, "root_path": "", "headers": headers,
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
        }  # fmt: skip
        start, *rest = asyncio.run(ask(app, scope, body))
        seen[start["status"]] += 1
        said = b"".join(piece.get("body", b"") for piece in rest)
        assert not rest[-1].get("more_body", False)
        assert start["status"] < 500, said
        if start["status"] >= 400 and method != "HEAD":
            assert json.loads(said).keys() == {"error"}
            assert json.loads(said)["error"].keys() == {"message", "type", "param", "code"}
            says_little(said.decode())

    one()
    assert not service.num_open
    assert {200, 400, 404} <= seen.keys(), seen
