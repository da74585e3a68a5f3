"""Spans of requests: what they tell, and what they never do."""

import json

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from serve.errors import InvalidRequest
from serve.request import ChatRequest, Message, Options, TextEvent, TextToken, Usage
from serve.tracing import Tracing

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
