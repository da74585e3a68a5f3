"""What reaches Ray Serve's proxy of a request's headers. `tests/system/test_bad_input.py` shows it on the proxy itself."""

from typing import Any

from serve.http.proxy_headers import ProxyHeaders


async def passed(*headers: tuple[bytes, bytes], kind: str = "http") -> Any:
    seen: dict[str, Any] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope)

    await ProxyHeaders(app)({"type": kind, "headers": list(headers)}, None, None)  # type: ignore[arg-type]
    return seen["headers"]


async def test_what_ray_serve_is_told_by_proxies_is_left_out_however_it_is_written() -> None:
    host = (b"host", b"a")
    for name in (
        b"x-request-disconnect-disabled",
        b"X-Request-Timeout-Seconds",
        b"serve_multiplexed_model_id",
        b"Serve-Multiplexed_Model-Id",
        b"X-Manta-Bypass",
    ):
        assert await passed(host, (name, b"1")) == [host]


async def test_bytes_that_are_no_text_become_what_the_front_refuses() -> None:
    assert await passed((b"x-request-id", b"\xff\xfea"), (b"X_Session_Id", b"\xc3\xa9"), (b"traceparent", b"00-\xff")) == [
        (b"x-request-id", b"??a"),
        (b"X_Session_Id", b"??"),
        (b"traceparent", b"00-?"),
    ]


async def test_everything_else_is_as_it_was() -> None:
    headers = [(b"x-request-id", b"abc"), (b"x-request-id", b"d e"), (b"authorization", b"Bearer \xff")]
    assert await passed(*headers) == headers
    assert await passed((b"x-request-id", b"\xff"), kind="websocket") == [(b"x-request-id", b"\xff")]
