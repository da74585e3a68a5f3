"""What Ray Serve's proxy is made to do: sockets that a client cannot hold for ever, nor a dead proxy, and losses told as our errors."""

import asyncio
import gc
import socket
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

import grpc
import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.serve._private import http_util
from ray.serve._private.common import DeploymentID
from ray.serve._private.grpc_util import get_grpc_response_status
from ray.serve._private.http_util import get_http_response_status
from ray.serve._private.proxy_response_generator import ProxyResponseGenerator
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import DeploymentUnavailableError, RequestCancelledError

from serve.proxy_hook import ConfiguredSockets, read_errors_of_left_tasks, with_manta_errors
from tests.system.server import free_ports


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with closing(ConfiguredSockets(0.3).socket(socket.AF_INET, socket.SOCK_STREAM)) as made:
        made.bind(("127.0.0.1", 0))
        made.listen()
        yield made


def connected(listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    """The server's end, and that of a client that takes little at once."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(listener.getsockname())
    return listener.accept()[0], client


def sent_until_it_is_over(server: socket.socket) -> int:
    server.setblocking(False)
    sent, until = 0, time.monotonic() + 60
    while time.monotonic() < until:
        try:
            sent += server.send(bytes(65536))
        except BlockingIOError:
            time.sleep(0.05)
        except TimeoutError:  # the kernel's own ETIMEDOUT
            return sent
    raise AssertionError("it is still connected")


def test_a_client_that_takes_nothing_is_left_by_the_kernel_and_little_waits_for_it(listener: socket.socket) -> None:
    server, client = connected(listener)
    with server, client:
        assert sent_until_it_is_over(server) < 1 << 20


async def test_the_proxys_own_http_server_notices_that_such_a_client_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    told: asyncio.Queue[str] = asyncio.Queue()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        async def watch() -> None:
            while (message := await receive())["type"] != "http.disconnect":
                pass
            told.put_nowait(message["type"])

        watching = asyncio.create_task(watch())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not watching.done():
            await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
            await asyncio.sleep(0)

    monkeypatch.setattr(http_util, "socket", ConfiguredSockets(0.3))
    (port,) = free_ports(1)
    options, loop = HTTPOptions(host="127.0.0.1", port=port), asyncio.get_running_loop()
    serving, server = await http_util.start_asgi_http_server(endless, options, event_loop=loop)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    with client:
        async with asyncio.timeout(60):
            while not server.started:  # noqa: ASYNC110  (uvicorn has no event for it)
                await asyncio.sleep(0.01)
            await loop.sock_connect(client, ("127.0.0.1", port))
            await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert await told.get() == "http.disconnect"
    server.should_exit = True
    await serving


def test_a_port_whose_connections_cool_down_can_be_listened_at(listener: socket.socket) -> None:
    address = listener.getsockname()
    server, client = connected(listener)
    listener.close()
    server.close()  # first, as a killed process's sockets are
    client.close()
    with ConfiguredSockets(0.3).socket(socket.AF_INET, socket.SOCK_STREAM) as next_one:
        next_one.bind(address)
        next_one.listen()
        with ConfiguredSockets(0.3).socket(socket.AF_INET, socket.SOCK_STREAM) as third, pytest.raises(OSError, match="in use"):
            third.bind(address)


def test_the_loss_of_a_front_is_told_as_one_of_our_errors() -> None:
    lost = RayActorError("class_name: ServeReplica, ip: 10.0.0.7")
    status = with_manta_errors(get_http_response_status, over_grpc=False)(lost, None, "r")
    assert (status.code, status.headers) == (503, [(b"retry-after", b"1")])
    assert status.message["error"]["code"] == "unavailable"
    status = with_manta_errors(get_grpc_response_status, over_grpc=True)(lost, None, "r")
    assert status.code is grpc.StatusCode.UNAVAILABLE
    assert "ServeReplica" not in status.message
    unavailable = with_manta_errors(get_http_response_status, over_grpc=False)(
        DeploymentUnavailableError(DeploymentID(name="Front")), None, "r"
    )
    assert (unavailable.code, "Front" in str(unavailable.message["error"])) == (503, False)


@pytest.mark.parametrize("over_grpc", [False, True])
def test_of_what_went_wrong_within_only_an_id_is_told(over_grpc: bool) -> None:
    status_of = get_grpc_response_status if over_grpc else get_http_response_status
    for wrong in (ValueError("/etc/secrets"), RayTaskError("f", "Traceback /etc/secrets", ValueError())):
        status = with_manta_errors(status_of, over_grpc=over_grpc)(wrong, None, "r")
        assert status.code == (grpc.StatusCode.INTERNAL if over_grpc else 500)
        assert "internal error; the server's log has it under" in str(status.message)
        assert "secrets" not in str(status.message)
    late = with_manta_errors(status_of, over_grpc=over_grpc)(TimeoutError(), 3.0, "r")
    assert late.code == (grpc.StatusCode.DEADLINE_EXCEEDED if over_grpc else 408)


class Answer:
    """Ray Serve's answer to a call, as far as its proxy knows it: a cancel makes whoever waits for it fail."""

    def __init__(self) -> None:
        self._ended = asyncio.Event()

    def cancelled(self) -> bool:
        return self._ended.is_set()

    def cancel(self) -> None:
        self._ended.set()

    def __await__(self) -> Generator[Any, None, None]:
        yield from self._ended.wait().__await__()
        raise RequestCancelledError("r")


async def test_a_client_that_goes_leaves_no_error_that_nobody_reads() -> None:
    class Patched(ProxyResponseGenerator):
        pass

    read_errors_of_left_tasks(Patched)
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context["message"]))
    for kind, expected in ((ProxyResponseGenerator, ["Task exception was never retrieved"]), (Patched, [])):
        reported.clear()
        waiting = asyncio.create_task(anext(kind(Answer())))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.wait([waiting])
        del waiting  # and with it the traceback that has the task
        await asyncio.sleep(0.01)
        gc.collect()
        assert reported == expected
