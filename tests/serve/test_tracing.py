"""Spans of requests: what they tell, and what they never do."""

import dataclasses
import json
from pathlib import Path

import grpc
import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import StatusCode

from serve.errors import InvalidRequest, ServerStopped
from serve.grpc.generated import messages_pb2, service_pb2, service_pb2_grpc
from serve.request import ChatRequest, Message, Options, TextEvent, TextToken, Usage
from serve.request_timing import RequestTiming
from serve.tracing import Tracing
from tests.serve.in_process import MODEL, fronts

SECRET = "what a client wrote"
REQUEST = ChatRequest(
    request_id="chatcmpl-1", model="m", messages=(Message(role="user", content=SECRET),), options=Options(temperature=0.5, stop=(SECRET,))
)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> Tracing:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider, ["m"])


def test_a_request_is_a_span_of_the_conventions(tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    watch = tracing.begin(REQUEST)
    watch.event(TextEvent(choice=0, text=SECRET, tokens=(TextToken(id=1, text=SECRET, raw=SECRET.encode()),)))
    watch.event(TextEvent(choice=0, finish_reason="stop", usage=Usage(prompt_tokens=5, completion_tokens=1)))
    watch.ended()
    (span,) = exporter.get_finished_spans()
    assert span.name == "chat m"
    assert span.attributes["gen_ai.operation.name"] == "chat"
    assert span.attributes["gen_ai.usage.input_tokens"] == 5
    assert span.attributes["gen_ai.usage.output_tokens"] == 1
    assert span.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert span.attributes["gen_ai.server.time_to_first_token"] >= 0
    assert SECRET not in json.dumps(json.loads(span.to_json()))


def test_a_failure_is_told_by_its_code(tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    tracing.begin(REQUEST).failed(InvalidRequest(SECRET))
    (span,) = exporter.get_finished_spans()
    assert span.attributes["error.type"] == "invalid_value"
    assert not span.status.is_ok
    assert SECRET not in span.to_json()


@pytest.mark.parametrize(
    ("error", "type_", "status"),
    [(GeneratorExit(), "client_left", StatusCode.UNSET), (ServerStopped(), "stopped", StatusCode.ERROR)],
)
def test_a_client_that_leaves_is_no_error_and_a_server_that_stops_is_one(
    tracing: Tracing, exporter: InMemorySpanExporter, error: BaseException, type_: str, status: StatusCode
) -> None:
    tracing.begin(REQUEST).failed(error)
    (span,) = exporter.get_finished_spans()
    assert (span.attributes["error.type"], span.status.status_code) == (type_, status)


PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TIMING = RequestTiming(front_s=0.5, queue_s=1.0, prefill_s=2.0, decode_s=3.0, network_s=0.1, detokenise_s=0.0)


def test_a_clients_trace_goes_on_into_the_engines_phases(tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    watch = tracing.begin(dataclasses.replace(REQUEST, trace={"traceparent": PARENT, "tracestate": "vendor=1"}))
    watch.event(TextEvent(choice=0, finish_reason="stop", usage=Usage(prompt_tokens=5, completion_tokens=1), timing=TIMING))
    watch.ended()
    *phases, request = exporter.get_finished_spans()
    assert {format(span.context.trace_id, "032x") for span in (*phases, request)} == {PARENT[3:35]}
    assert format(request.parent.span_id, "016x") == PARENT[36:52]
    assert request.context.trace_state["vendor"] == "1"
    assert [span.name for span in phases] == ["engine queue", "engine prefill", "engine decode"]
    assert all(span.parent.span_id == request.context.span_id for span in phases)
    begun_ns = request.start_time
    assert [round((span.start_time - begun_ns) / 1e9, 3) for span in phases] == [0.5, 1.5, 3.5]
    assert [round((span.end_time - span.start_time) / 1e9, 3) for span in phases] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("said", ["", "00-0-0-01", "x" * 9_000, PARENT[:-1], "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_what_is_no_trace_begins_a_new_one(tracing: Tracing, exporter: InMemorySpanExporter, said: str) -> None:
    tracing.begin(dataclasses.replace(REQUEST, trace={"traceparent": said})).ended()
    (span,) = exporter.get_finished_spans()
    assert span.parent is None


def test_a_client_that_does_not_sample_is_heard(exporter: InMemorySpanExporter) -> None:
    provider = TracerProvider(sampler=ParentBasedTraceIdRatio(1.0))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    Tracing(provider, ["m"]).begin(dataclasses.replace(REQUEST, trace={"traceparent": PARENT[:-2] + "00"})).ended()
    assert exporter.get_finished_spans() == ()


async def test_both_fronts_take_a_trace_over(tiny_folder: Path, tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    asked = {"model": MODEL, "messages": [{"role": "user", "content": SECRET}], "max_tokens": 3}
    async with fronts(tiny_folder, observers=[tracing]) as both:
        async with httpx.AsyncClient(base_url=both.http, timeout=60) as http:
            for headers in ({"traceparent": PARENT}, [("traceparent", PARENT)] * 2):  # said twice it is none
                assert (await http.post("/v1/chat/completions", json=asked, headers=headers)).status_code == 200
        async with grpc.aio.insecure_channel(both.grpc.removeprefix("grpc://")) as channel:
            message = messages_pb2.Message(role=messages_pb2.ROLE_USER, content=SECRET)
            prompt = messages_pb2.Prompt(text=SECRET)
            stub, metadata = service_pb2_grpc.MantaServiceStub(channel), [("traceparent", PARENT)]
            await stub.Chat(service_pb2.ChatRequest(model=MODEL, messages=[message]), metadata=metadata)
            await stub.Generate(service_pb2.GenerateRequest(model=MODEL, prompts=[prompt]), metadata=metadata)
    spans = exporter.get_finished_spans()
    of_the_trace = [span.name for span in spans if format(span.context.trace_id, "032x") == PARENT[3:35]]
    assert of_the_trace.count("engine decode") == 3
    assert len(spans) == 4 * (len(of_the_trace) // 3)
