"""Hundreds of clients that go at a random moment, over HTTP and gRPC: nothing of them stays, and no process has anything to report."""

import asyncio
import contextlib
import json
import os
import random
import shutil
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from manta_client import AsyncClient, MantaError

from serve.grpc.generated import service_pb2, service_pb2_grpc
from tests.processes import named
from tests.system.server import Server, eventually, serving

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(600)]
NUM_CLIENTS = int(os.environ.get("MANTA_TEST_CANCELS", "400"))
NUM_AT_ONCE = 24
LONGEST_S = 1.5
SUSPECT = ("Traceback", "never retrieved", "never awaited", "asynchronous generator", "SIGSEGV", "Task was destroyed")
CONTEXT_LINES = 100
NOT_OF_REQUESTS = ("gcs", "raylet", "dashboard", "monitor")
"""How the logs of those processes of Ray begin that no request passes. Some complain if another Ray on this machine has their ports."""
OPTIONS = {"max_tokens": 150, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "Tell a story."}]


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="mc-", dir="/tmp"))
    yield folder
    if "MANTA_TEST_KEEP_LOGS" not in os.environ:
        shutil.rmtree(folder, ignore_errors=True)


async def over_http(server: Server, moment_s: float, *, stream: bool, reset: bool, whole: bool) -> None:
    body = json.dumps({"model": "demo", "messages": MESSAGES, "stream": stream, **OPTIONS}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.http_port)
    if reset:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + (body if whole else body[:10]))
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(reader.readuntil(b"data: [DONE]"), moment_s)
    writer.close()


async def over_grpc(stub: service_pb2_grpc.MantaServiceStub, moment_s: float, *, stream: bool, by_deadline: bool) -> None:
    options = {"max_tokens": OPTIONS["max_tokens"], "ignore_eos": True}
    request = service_pb2.ChatRequest(model="demo", messages=[{"role": "ROLE_USER", "content": "Tell a story."}], options=options)
    timeout = moment_s if by_deadline else None
    if stream:
        call = stub.ChatStream(service_pb2.ChatStreamRequest(request=request), timeout=timeout)
    else:
        call = stub.Chat(request, timeout=timeout)

    async def read() -> None:
        if not stream:
            await call
            return
        async for _ in call:
            pass

    reading = asyncio.create_task(read())
    await asyncio.wait([reading], timeout=None if by_deadline else moment_s)
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
        await reading


async def by_the_client_library(client: AsyncClient, moment_s: float) -> None:
    async def read() -> None:
        async with client.chat.stream(model="demo", messages=MESSAGES, **OPTIONS) as stream:
            async for _ in stream:
                pass

    with contextlib.suppress(TimeoutError, MantaError):
        await asyncio.wait_for(read(), moment_s)


async def all_of_them(server: Server) -> None:
    chance, at_once = random.Random(7), asyncio.Semaphore(NUM_AT_ONCE)
    address = server.grpc.removeprefix("grpc://")
    async with grpc.aio.insecure_channel(address) as channel, AsyncClient(server.grpc, max_retries=0) as client:
        stub = service_pb2_grpc.MantaServiceStub(channel)

        async def one() -> None:
            moment_s, kind = chance.uniform(0.0, LONGEST_S) ** 2 / LONGEST_S, chance.randrange(8)
            async with at_once:
                if kind < 3:
                    await over_http(server, moment_s, stream=kind != 2, reset=kind == 1, whole=True)
                elif kind < 6:
                    await over_grpc(stub, moment_s, stream=kind != 5, by_deadline=kind == 4)
                elif kind == 6:
                    await over_http(server, moment_s, stream=True, reset=chance.random() < 0.5, whole=False)
                else:
                    await by_the_client_library(client, moment_s)

        await asyncio.gather(*(one() for _ in range(NUM_CLIENTS)))


def _suspect(file: Path) -> Iterator[str]:
    """Every suspect line of a log with what surrounds it: a traceback's cause is in its last lines."""
    lines = file.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines):
        if any(word in line for word in SUSPECT):
            yield "\n".join((f"{file.name}:{number + 1}:", *lines[max(0, number - 3) : number + CONTEXT_LINES]))


def _sum(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))


def test_clients_that_go_at_any_moment_leave_nothing_behind(demo_folder: Path, ray_folder: Path) -> None:
    with serving(str(demo_folder), "--name", "demo", "--set", f"ray.temp_dir={ray_folder}") as server:
        proxies = named(server.descendants, "ray::ProxyActor")
        asyncio.run(all_of_them(server))
        eventually(lambda: _sum(server.url, "manta_requests_in_progress") == 0)
        eventually(lambda: _sum(server.url, "manta_requests_running") + _sum(server.url, "manta_requests_waiting") == 0)
        assert proxies
        assert all(proxy.is_running() for proxy in proxies)
    files = [file for file in ray_folder.glob("session_*/logs/**/*") if file.is_file() and not file.name.startswith(NOT_OF_REQUESTS)]
    found = [told for file in files for told in _suspect(file)]
    assert not found, "\n".join(found[:10])
