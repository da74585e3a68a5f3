"""Who is told of the socket past Ray and who is not; what whole answers (tests/serve/*/test_bypass.py) do not show."""

import asyncio
import logging
from typing import Any

import pytest

from cluster.bypass import Receiver
from serve.bypass import HEADER, FrontEndpoint, ProxyEndpoint
from serve.http.bypass import BYPASS_STREAM, FrontBypass, ProxyBypass

NODE = "a-node"
NAME = HEADER.encode()


@pytest.fixture(autouse=True)
def short_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/tmp")


class Kept:
    """An app that keeps the scopes it is called with."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)


def request(method: str, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http", "method": method, "headers": [(b"host", b"a"), *headers]}


async def nobody(*_: Any) -> None:
    raise AssertionError


async def connected(bypass: FrontEndpoint, told: str) -> None:
    async with asyncio.timeout(60):
        while bypass.stream_for([told]) is None:  # noqa: ASYNC110  (zmq's threads have no event for it)
            await asyncio.sleep(0.001)


async def test_only_what_may_be_a_stream_is_told_of_a_socket() -> None:
    app, endpoint = Kept(), ProxyEndpoint(NODE)
    proxy = ProxyBypass(app, endpoint=endpoint)
    for method in ("GET", "POST", "HEAD"):
        await proxy(request(method), nobody, nobody)
    told = [[value for name, value in scope["headers"] if name == NAME] for scope in app.scopes]
    assert [len(each) for each in told] == [0, 1, 0]
    node, number, address = told[1][0].split()
    assert (node, number) == (NODE.encode(), b"0")
    assert address.startswith(b"ipc://")
    assert endpoint._receiver is not None
    assert not endpoint._receiver._streams
    await endpoint._receiver.close()


async def test_a_front_is_not_shown_the_header_and_believes_one_only() -> None:
    app, bypass, receiver = Kept(), FrontEndpoint(NODE), Receiver()
    front = FrontBypass(app, bypass=bypass)
    told = f"{NODE} 0 {receiver.address}"
    await connected(bypass, told)
    one = (NAME, told.encode())
    for headers in ((), (one,), (one, one), (one, (NAME, b"x"))):
        await front(request("POST", *headers), nobody, nobody)
    assert [scope[BYPASS_STREAM] is not None for scope in app.scopes] == [False, True, False, False]
    assert all(scope["headers"] == [(b"host", b"a")] for scope in app.scopes)
    await receiver.close()


async def test_a_socket_of_another_hosts_proxy_is_not_written_to_even_if_it_can_be_seen() -> None:
    bypass, receiver = FrontEndpoint("another"), Receiver()
    assert bypass.stream_for([f"{NODE} 0 {receiver.address}"]) is None
    assert not bypass._senders
    await receiver.close()


async def test_an_obstacle_is_told_once_and_again_when_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    bypass, receiver = FrontEndpoint(NODE), Receiver()
    for _ in range(2):
        assert bypass.stream_for([f"{NODE} 0 ipc:///nowhere"]) is None
    assert caplog.text.count("is not visible from this container") == 1
    await connected(bypass, f"{NODE} 0 {receiver.address}")
    assert bypass.stream_for([f"{NODE} 0 ipc:///nowhere"]) is None
    assert caplog.text.count("is not visible from this container") == 2
    await receiver.close()


async def test_while_streams_go_by_ray_no_request_is_told_of_a_socket_and_later_one_is(caplog: pytest.LogCaptureFixture) -> None:
    endpoint = ProxyEndpoint(NODE)
    first = endpoint.open()
    assert first is not None
    for _ in range(3):
        endpoint.pause("a chunk was lost")
    assert caplog.text.count("a chunk was lost") == 1
    assert endpoint.open() is None
    endpoint._paused_until = 0
    assert endpoint.open() is not None
    assert endpoint._receiver is not None
    await endpoint._receiver.close()
