"""Which requests belong together: HTTP and gRPC take it from a header, HTTP also from `user`."""

from typing import Any

import grpc
import httpx
import pytest

from serve.grpc.generated import messages_pb2, service_pb2, service_pb2_grpc
from serve.grpc.server import start_server
from serve.http.app import create_app
from serve.session import SESSION_HEADER
from tests.serve.grpc.conftest import ScriptedService as GrpcService
from tests.serve.http.conftest import MODEL, ScriptedService

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
PROMPT = {"model": MODEL, "prompt": "Hi"}


async def over_http(path: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[httpx.Response, ScriptedService]:
    service = ScriptedService()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(lambda: service)), base_url="http://manta") as client:
        return await client.post(path, json=body, headers=headers), service


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", PROMPT)])
@pytest.mark.parametrize(
    ("headers", "user", "session"),
    [({}, None, ""), ({}, "u-1", "u-1"), ({SESSION_HEADER: "s:1"}, None, "s:1"), ({SESSION_HEADER: "s:1"}, "u-1", "s:1")],
)
async def test_over_http_the_header_counts_before_the_user(
    path: str, body: dict[str, Any], headers: dict[str, str], user: str | None, session: str
) -> None:
    answer, service = await over_http(path, body | ({"user": user} if user else {}), headers)
    assert answer.status_code == 200
    assert service.asked[0].session == session


@pytest.mark.parametrize("named", ["", "a b", "x" * 129])
async def test_what_is_no_identifier_is_refused(named: str) -> None:
    answer, service = await over_http("/v1/completions", PROMPT, {SESSION_HEADER: named})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == SESSION_HEADER
    assert not service.asked


async def test_over_grpc_it_is_metadata() -> None:
    service = GrpcService()
    server, port = await start_server(service, "127.0.0.1:0")
    chat = service_pb2.ChatRequest(model="tiny", messages=[messages_pb2.Message(role=messages_pb2.ROLE_USER, content="hi")])
    generate = service_pb2.GenerateRequest(model="tiny", prompts=[messages_pb2.Prompt(text="hi")])
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = service_pb2_grpc.MantaServiceStub(channel)
        await stub.Chat(chat, metadata=((SESSION_HEADER, "s-1"),))
        await stub.Generate(generate, metadata=((SESSION_HEADER, "s-2"),))
        await stub.Generate(generate)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Chat(chat, metadata=((SESSION_HEADER, "a b"),))
    await server.stop(grace=None)
    assert [request.session for request in service.asked] == ["s-1", "s-2", ""]
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
