"""The process that holds clients' sockets: it leaves who does not read, and is back at its ports as soon as it was killed."""

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import grpc.aio
import httpx
import psutil
import pytest
from google.protobuf.json_format import ParseDict
from manta_client import Client

from serve.grpc.generated import admin_pb2, admin_pb2_grpc, service_pb2, service_pb2_grpc
from tests.faults.streams import Ask, Seen, follow, golden_of
from tests.history import History, violations
from tests.processes import named
from tests.system.server import Server, eventually, serving
from tests.system.tiny_model import write_tiny

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

LONG, CHOICES = 1900, 8
DEAF = 3
MOST_BYTES = 64 << 20
"""What the proxy and the front may grow by for the sake of so many clients that do not read."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = write_tiny(tmp_path_factory.mktemp("tiny"))
    with serving(str(folder), "--name", "tiny", "--dtype", "float32", "--set", "http.slow_client_timeout_s=2") as server:
        yield server


def connections(port: int, far_port: int | None = None) -> list[str]:
    """States of the server's ends at a port, of one client or of all."""
    ends = [one for one in psutil.net_connections("tcp") if one.laddr and one.laddr.port == port and one.raddr]
    return [one.status for one in ends if far_port is None or one.raddr.port == far_port]


def test_a_client_that_does_not_read_over_http_is_left(server: Server) -> None:
    body = {
        "model": "tiny",
        "prompt": "a",
        "max_tokens": LONG,
        "n": CHOICES,
        "ignore_eos": True,
        "stream": True,
        "logprobs": 5,
        "temperature": 1.0,
    }
    raw = json.dumps(body).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.http_port))
        own_port = client.getsockname()[1]
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw
        )
        assert client.recv(12) == b"HTTP/1.1 200"
        eventually(lambda: "ESTABLISHED" not in connections(server.http_port, own_port), 240)
        client.settimeout(60)
        told = b""
        try:
            while piece := client.recv(1 << 20):
                told += piece
        except ConnectionError:
            pass
    assert b"[DONE]" not in told
    assert httpx.get(f"{server.url}/readyz", timeout=30).status_code == 200


@pytest.mark.slow
async def test_clients_that_do_not_read_over_grpc_are_left_and_nobody_else_notices(server: Server) -> None:
    options = {"max_tokens": LONG, "n": CHOICES, "ignore_eos": True, "logprobs": 5, "temperature": 1.0}
    request = {"model": "tiny", "prompts": [{"text": "a"}], "options": options}
    message = ParseDict({"request": request}, service_pb2.GenerateStreamRequest())
    asks = [Ask(protocol, "greedy", "Once upon a time") for protocol in ("http", "grpc")]
    golden = {ask: golden_of(seen.history) for ask, seen in (await answers(server, asks)).items()}
    while await open_requests(server):  # an answer is read before its request is closed
        continue
    held, grown = held_bytes(server), 0
    async with asyncio.timeout(400), AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(channel_to(server)) for _ in range(DEAF)]
        deaf = [service_pb2_grpc.MantaServiceStub(channel).GenerateStream(message) for channel in channels]
        assert grpc.aio.EOF not in [await call.read() for call in deaf]
        assert await open_requests(server) == DEAF
        while await open_requests(server):
            for ask, seen in (await answers(server, asks)).items():
                assert not violations(seen.history, golden[ask])
            grown = max(grown, held_bytes(server) - held)
        for call in deaf:
            kinds = set[str]()
            with pytest.raises(grpc.aio.AioRpcError, match="nothing of this stream was read") as told:
                await read_on(call, kinds)
            assert told.value.code() is grpc.StatusCode.ABORTED
            assert kinds == {"delta"}, "no choice has come to its end"
    assert grown < MOST_BYTES


def channel_to(server: Server) -> grpc.aio.Channel:
    """That takes no more than a window of 64 KiB before it is read: without probes of the way's capacity that stays so."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
    return grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}", options=options)


async def answers(server: Server, asks: list[Ask]) -> dict[Ask, Seen]:
    seen = {ask: Seen(ask, History(ask.name)) for ask in asks}
    await asyncio.gather(*(follow(server.url, f"127.0.0.1:{server.grpc_port}", one) for one in seen.values()))
    return seen


async def read_on(call: Any, kinds: set[str]) -> None:
    """Whatever there still is, by its kind."""
    while (event := await call.read()) is not grpc.aio.EOF:
        kinds.add(event.WhichOneof("event"))


async def open_requests(server: Server) -> int:
    async with channel_to(server) as channel:
        load: Any = await admin_pb2_grpc.AdminServiceStub(channel).GetLoad(admin_pb2.GetLoadRequest(), timeout=30)
    return int(load.open_requests)


def held_bytes(server: Server) -> int:
    """By the proxy and the front."""
    proxies = named(server.descendants, "ray::ProxyActor")
    return sum(process.memory_info().rss for process in (*proxies, *server.fronts()))


def test_a_killed_proxy_is_back_while_its_old_connections_cool_down_and_the_library_goes_on(server: Server) -> None:
    asked: Any = {"model": "tiny", "prompt": "a", "max_tokens": 500, "ignore_eos": True, "temperature": 1.0, "seed": 3}
    (proxy,) = named(server.descendants, "ray::ProxyActor")
    with httpx.Client(base_url=server.url, timeout=30) as client, Client(server.grpc, timeout=300) as library:
        assert client.get("/readyz").status_code == 200
        undisturbed = library.completions.create(**asked)
        with library.completions.stream(**asked) as stream:
            for number, _ in enumerate(stream):
                if number == 8:
                    proxy.kill()
            final = stream.final()
        psutil.wait_procs([proxy], timeout=20)
    assert final.choices[0].token_ids == undisturbed.choices[0].token_ids
    assert final.text == undisturbed.text
    eventually(lambda: _answers(server), 240)
    cooling = {"TIME_WAIT", "FIN_WAIT1", "FIN_WAIT2"}
    if not cooling & set(connections(server.http_port)):
        pytest.skip("nothing cools down any more, so this has shown nothing")


def _answers(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
