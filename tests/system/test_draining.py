"""Two fronts behind one proxy, one of which is told to drain: no request is refused, because the other one gets them all, and soon grants
all of every quota."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from manta_client import AsyncClient, Unavailable

from serve.key_file import locked_key_file, new_key
from tests.system.server import Server, eventually, serving
from tests.system.tiny_model import write_tiny

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

PROMPT = {"model": "tiny", "prompt": "a", "max_tokens": 2}


OPERATOR, LIMITED = (new_key(scopes=["infer", "admin", "metrics"]), new_key(scopes=["infer"], requests_per_minute=60))
"""Two keys, each with its entry for the key file: one that may do everything, and one with a quota."""


def sends(key: tuple[str, object]) -> dict[str, str]:
    return {"authorization": f"Bearer {key[0]}"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = write_tiny(tmp_path_factory.mktemp("tiny"))
    keys = Path(tmp_path_factory.mktemp("keys"), "keys.json")
    with locked_key_file(keys) as write:
        write((OPERATOR[1], LIMITED[1]))
    settings = ("--set", "fronts.count=2", "--set", f"auth.keys_file={keys}")
    with serving(str(folder), "--name", "tiny", "--dtype", "float32", *settings) as server:
        yield server


def draining(server: Server) -> list[float]:
    """What each front says of itself: 1 if it drains."""
    lines = httpx.get(f"{server.url}/metrics", headers=sends(OPERATOR), timeout=30).text.splitlines()
    return sorted(float(line.rpartition(" ")[2]) for line in lines if line.startswith("manta_front_draining{"))


async def until_granted_every(seconds: float, http: httpx.AsyncClient) -> None:
    """Wait until the front that answers grants `LIMITED` a request every so many ``seconds``: one if the whole quota is its, two if half of
    it is. It asks less often than half of the quota allows, so the bucket is full whenever it asks."""
    for _ in range(40):
        answer = await http.post("/v1/completions", json=PROMPT, headers=sends(LIMITED))
        if seconds - 0.5 < float(answer.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= seconds:
            return
        await asyncio.sleep(3)
    raise AssertionError(f"it never granted one every {seconds:g} s: {answer.headers}")


async def test_a_front_that_drains_is_given_no_requests_while_another_takes_them(server: Server) -> None:
    eventually(lambda: draining(server) == [0, 0])
    async with (
        httpx.AsyncClient(base_url=server.url, headers=sends(OPERATOR), timeout=60) as http,
        AsyncClient(server.grpc, api_key=OPERATOR[0], timeout=60, max_retries=0) as grpc,
    ):
        await until_granted_every(2.0, http)
        told = asyncio.Event()

        async def ask() -> int:
            """Ask by turns over HTTP and gRPC, before, while and after one front is told. Returns the answers after it."""
            after = 0
            while after < 25:
                assert (await http.post("/v1/completions", json=PROMPT)).status_code == 200
                await grpc.completions.create(**PROMPT)
                assert (await http.get("/readyz")).status_code == 200
                after += told.is_set()
            return after

        asking = asyncio.create_task(ask())
        await grpc.admin.drain()
        told.set()
        assert await asking == 25
        eventually(lambda: draining(server) == [0, 1])
        await until_granted_every(1.0, http)

        async with asyncio.timeout(120):  # calls of an operator reach either front, so each is told sooner or later
            while draining(server) != [1, 1]:
                await grpc.admin.drain()
        refused = await http.post("/v1/completions", json=PROMPT)
        assert (refused.status_code, refused.json()["error"]["code"], refused.headers["retry-after"]) == (503, "draining", "1")
        with pytest.raises(Unavailable):
            await grpc.completions.create(**PROMPT)
        async with asyncio.timeout(120):
            while draining(server) != [0, 0]:
                await grpc.admin.drain(undo=True)
        assert (await http.post("/v1/completions", json=PROMPT)).status_code == 200
