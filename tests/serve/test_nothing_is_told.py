"""What clients write, and what they are answered, is in no log line, no metric and no span of the server."""

import logging
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from serve.grpc.generated import service_pb2, service_pb2_grpc
from serve.logs import JsonFormatter
from serve.metrics import Instruments
from serve.metrics_page import MetricsPage
from serve.request_metrics import RequestMetrics
from serve.tracing import Tracing
from tests.serve.in_process import MODEL, fronts

SECRET = "zebrafinch"
ANSWER = "hornbill"
SAID = [{"role": "system", "content": SECRET}, {"role": "user", "content": f"What is a {SECRET}?", "name": SECRET}]
TOOL = {"type": "function", "function": {"name": SECRET, "description": SECRET, "parameters": {"properties": {SECRET: {"enum": [ANSWER]}}}}}
CALLED = [
    {
        "role": "assistant",
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": SECRET, "arguments": f'{{"a": "{SECRET}"}}'}}],
    },
    {"role": "tool", "tool_call_id": "a", "content": SECRET},
]
OURS = ("serve", "engine", "cluster", "model", "parallel", "manta", "uvicorn", "fastapi", "grpc", "asyncio")
BODIES: dict[str, dict[str, Any]] = {
    "a chat": {"messages": SAID, "structured_outputs": {"choice": [ANSWER]}, "stop": SECRET, "user": SECRET, "max_tokens": 20},
    "a stream": {"messages": SAID, "structured_outputs": {"choice": [ANSWER]}, "stream": True, "max_tokens": 20},
    "a call": {"messages": SAID, "tools": [TOOL], "tool_choice": "required", "max_tokens": 40},
    "a result": {"messages": [*SAID, *CALLED], "max_tokens": 2},
    "a number that is text": {"messages": SAID, "temperature": SECRET},
    "an unknown field": {"messages": SAID, SECRET: SECRET, "max_tokens": 1},
    "an unknown role": {"messages": [{"role": SECRET, "content": SECRET}]},
    "a broken expression": {"messages": SAID, "structured_outputs": {"regex": f"({SECRET}"}},
    "a schema that is none": {"messages": SAID, "guided_json": {"type": SECRET, SECRET: {"$ref": SECRET}}},
    "an unknown model": {"messages": SAID, "model": SECRET},
    "a prompt beyond the context": {"messages": [{"role": "user", "content": f"{SECRET} " * 2_000}]},
    "a call without its result": {"messages": [*SAID, CALLED[0]]},
}


async def test_what_is_said_stays_between_client_and_model(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    exporter, provider, instruments = InMemorySpanExporter(), TracerProvider(), Instruments("f")
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    caplog.set_level(logging.DEBUG)
    async with fronts(tiny_folder, observers=[RequestMetrics(instruments, [MODEL]), Tracing(provider, [MODEL])], pooling="last") as both:
        async with httpx.AsyncClient(base_url=both.http, timeout=60) as http:
            statuses = {name: (await http.post("/v1/chat/completions", json={"model": MODEL} | body)) for name, body in BODIES.items()}
            assert ANSWER in statuses["a chat"].text
            assert SECRET in statuses["a call"].text
            prompt = {"model": MODEL, "prompt": SECRET, "echo": True, "logprobs": 1, "max_tokens": 1}
            assert SECRET in (await http.post("/v1/completions", json=prompt)).text
            assert (await http.post("/v1/embeddings", json={"model": MODEL, "input": [SECRET]})).status_code == 200
            assert (await http.post("/v1/chat/completions", content=f'{{"{SECRET}'.encode())).status_code >= 400
        async with grpc.aio.insecure_channel(both.grpc.removeprefix("grpc://")) as channel:
            stub = service_pb2_grpc.MantaServiceStub(channel)
            message = {"role": "ROLE_USER", "content": SECRET}
            await stub.Chat(service_pb2.ChatRequest(model=MODEL, messages=[message], options={"max_tokens": 2}))
            for wrong in (
                {"model": SECRET},
                {"options": {"response_format": {"regex": f"({SECRET}"}}},
                {"tools": [{"name": f"{SECRET} "}]},
            ):
                with pytest.raises(grpc.aio.AioRpcError):
                    await stub.Chat(service_pb2.ChatRequest(**{"model": MODEL, "messages": [message]} | wrong))
        page = (await MetricsPage(instruments, [], NoOthers(), both.gate)(""))[0].decode()
    assert {answer.status_code for answer in statuses.values()} == {200, 400, 404}
    spans = [span.to_json() for span in exporter.get_finished_spans()]
    lines = [JsonFormatter().format(record) for record in caplog.records if record.name.split(".")[0] in OURS]
    assert len(spans) >= len(BODIES)
    assert f'model_name="{MODEL}"' in page
    assert lines
    for told in (*spans, *lines, page):
        assert SECRET not in told
        assert ANSWER not in told


class NoOthers:
    async def peers(self) -> tuple[()]:
        return ()
