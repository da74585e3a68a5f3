"""OpenTelemetry spans of requests, by the conventions for generative AI. Only this module imports opentelemetry; off by default.

A span holds model, parameters, counts and times, never a prompt, an answer or a key. It continues a client's trace (`traceparent`). The
phases in the engine are child spans, made from the times that the engine reports with its last event.
"""

import time
from collections.abc import Callable, Collection

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serve.request import AnyRequest, ChatRequest, CompletionRequest, EmbeddingRequest, Options, TextEvent
from serve.request_observer import RequestWatch, failure_code, is_leaving
from serve.request_timing import RequestTiming
from serve.version import version

OPERATIONS = {ChatRequest: "chat", CompletionRequest: "text_completion", EmbeddingRequest: "embeddings"}
PROPAGATOR = TraceContextTextMapPropagator()
"""The W3C's. A client's baggage is not propagated."""


class Tracing:
    """An observer that makes one span for each request."""

    def __init__(self, provider: TracerProvider, models: Collection[str], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._provider, self._models, self._clock = provider, models, clock
        self._tracer = provider.get_tracer("manta", version())

    def begin(self, request: AnyRequest) -> RequestWatch:
        operation = OPERATIONS[type(request)]
        since_s = 0.0 if request.arrived_s is None else self._clock() - request.arrived_s
        model = request.model if request.model in self._models else "unknown"  # never text from a client
        begun_ns = time.time_ns() - int(since_s * 1e9)
        parent = PROPAGATOR.extract(request.trace, context=Context())
        span = self._tracer.start_span(f"{operation} {model}", context=parent, kind=SpanKind.SERVER, start_time=begun_ns)
        options = Options() if isinstance(request, EmbeddingRequest) else request.options
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "manta",
            "gen_ai.request.model": model,
            "gen_ai.response.id": request.request_id,
            "gen_ai.request.max_tokens": options.max_tokens,
            "gen_ai.request.temperature": options.temperature,
            "gen_ai.request.top_p": options.top_p,
            "gen_ai.request.seed": options.seed,
            "gen_ai.request.choice.count": options.n,
            "manta.key": request.caller.id or None,
        }
        span.set_attributes({name: value for name, value in attributes.items() if value is not None})
        return _RequestSpan(self._tracer, span, begun_ns, self._clock, self._clock() - since_s)

    def close(self) -> None:
        """Export the remaining spans."""
        self._provider.shutdown()


class _RequestSpan:
    def __init__(self, tracer: Tracer, span: Span, begun_ns: int, clock: Callable[[], float], begun_s: float) -> None:
        self._tracer, self._span, self._begun_ns, self._clock, self._begun_s = tracer, span, begun_ns, clock, begun_s
        self._has_token = False
        self._reasons: list[str] = []

    def event(self, event: TextEvent) -> None:
        if event.tokens and not self._has_token:
            self._has_token = True
            self._span.set_attribute("gen_ai.server.time_to_first_token", self._clock() - self._begun_s)
        if event.finish_reason is not None:
            self._reasons.append(event.finish_reason)
        if event.usage is not None:
            self._span.set_attribute("gen_ai.usage.input_tokens", event.usage.prompt_tokens)
            self._span.set_attribute("gen_ai.usage.output_tokens", event.usage.completion_tokens)
            self._span.set_attribute("gen_ai.usage.cache_read.input_tokens", event.usage.cached_tokens)
        if event.timing is not None:
            for phase in ("front", "queue", "prefill", "decode", "network", "detokenise"):
                self._span.set_attribute(f"manta.{phase}_s", getattr(event.timing, f"{phase}_s"))
            self._engine_spans(event.timing)

    def _engine_spans(self, timing: RequestTiming) -> None:
        """Child spans of the phases. The network time is not split into both ways: the phases begin when the front is done."""
        parent, at_s = set_span_in_context(self._span, Context()), timing.front_s
        for phase, spent_s in (("queue", timing.queue_s), ("prefill", timing.prefill_s), ("decode", timing.decode_s)):
            start_ns, end_ns = (self._begun_ns + int(s * 1e9) for s in (at_s, at_s + spent_s))
            self._tracer.start_span(f"engine {phase}", context=parent, start_time=start_ns).end(end_ns)
            at_s += spent_s

    def ended(self) -> None:
        self._span.set_attribute("gen_ai.response.finish_reasons", self._reasons)
        self._span.end()

    def failed(self, error: BaseException) -> None:
        self._span.set_attribute("error.type", failure_code(error))
        self._span.set_status(Status(StatusCode.UNSET if is_leaving(error) else StatusCode.ERROR))
        self._span.end()


def otlp_tracing(endpoint: str, models: Collection[str], *, ratio: float) -> Tracing:
    """Exports spans to ``endpoint`` by OTLP over HTTP (…/v1/traces) in the background. ``ratio``: the fraction of requests to trace."""
    resource = Resource.create({"service.name": "manta", "service.version": version()})
    provider = TracerProvider(resource=resource, sampler=ParentBasedTraceIdRatio(ratio))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Tracing(provider, models)
