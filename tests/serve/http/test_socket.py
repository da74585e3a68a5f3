"""What only shows on a real socket: clients that leave, and bodies that are too large to send."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from serve.limits import Limits
from tests.serve.http.conftest import ScriptedService
from tests.serve.http.loopback import eventually, served

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("waits_at", [0, 2])
async def test_a_client_that_hangs_up_at_any_time_closes_the_services_iterator(
    app: Any, service: ScriptedService, chat_body: Any, stream: bool, waits_at: int
) -> None:
    service.waits_at = waits_at
    async with served(app) as url, httpx.AsyncClient(base_url=url) as client:
        asking = asyncio.create_task(client.post(CHAT, json=chat_body | {"stream": stream}))
        await asyncio.wait_for(service.waiting.wait(), 60)
        assert service.num_open == 1
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await eventually(lambda: service.num_open == 0)
        assert service.num_closed_early == 1
        service.waits_at = None
        assert (await client.post(CHAT, json=chat_body)).status_code == 200


async def test_a_server_that_cancels_the_call_closes_the_services_iterator(app: Any, service: ScriptedService, chat_body: Any) -> None:
    """Ray Serve ends a call by cancelling its task instead of by a message."""
    service.waits_at = 1
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://manta") as client:
        asking = asyncio.create_task(client.post(CHAT, json=chat_body | {"stream": True}))
        await asyncio.wait_for(service.waiting.wait(), 60)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    assert (service.num_open, service.num_closed_early) == (0, 1)


@pytest.mark.parametrize(("announced", "most_taken"), [(True, 0), (False, Limits().body_bytes + 1_000_000)], ids=["announced", "chunked"])
async def test_of_64_mib_no_more_than_the_limit_is_taken(app: Any, chat_body: Any, announced: bool, most_taken: int) -> None:
    taken = 0

    async def counting(scope: Any, receive: Any, send: Any) -> None:
        async def counted() -> Any:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            return message

        await app(scope, counted, send)

    async def body() -> Any:
        for _ in range(1_024):
            yield b" " * 65_536

    headers = {"content-type": "application/json"} | ({"content-length": str(64 * 1024 * 1024)} if announced else {})
    async with served(counting) as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.post(CHAT, content=body(), headers=headers)).status_code == 413
        assert taken <= most_taken
        assert (await client.post(CHAT, json=chat_body)).status_code == 200


async def test_the_first_piece_of_a_stream_comes_before_the_rest_is_made(app: Any, service: ScriptedService, chat_body: Any) -> None:
    service.waits_at = 1
    async with served(app) as url, httpx.AsyncClient(base_url=url) as client:
        async with client.stream("POST", CHAT, json=chat_body | {"stream": True}) as answer:
            lines = answer.aiter_lines()
            role, _, first = [await anext(lines) for _ in range(3)]
        assert json.loads(role.removeprefix("data: "))["choices"][0]["delta"]["role"] == "assistant"
        assert json.loads(first.removeprefix("data: "))["choices"][0]["delta"]["content"] == "Hello"
