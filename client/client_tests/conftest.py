"""A scripted server on a loopback port, spoken to over real gRPC."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from manta_client._generated import messages_pb2, service_pb2, service_pb2_grpc

WORDS = ("The", " sky", " is", " blue")


class Refusal(Exception):
    """What the script answers a call with instead of an answer."""

    def __init__(self, code: grpc.StatusCode, message: str = "no", *, retry_after_s: float | None = None, param: str = "") -> None:
        self.code, self.message = code, message
        details = [error_details_pb2.ErrorInfo(reason=f"SCRIPTED_{code.name}", domain="manta")]
        details.append(error_details_pb2.RequestInfo(request_id="chatcmpl-7"))
        if param:
            violation = error_details_pb2.BadRequest.FieldViolation(field=param, description=message)
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        if retry_after_s is not None:
            delay = Duration()
            delay.FromNanoseconds(int(retry_after_s * 1e9))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        self.details = details

    def tell(self, context: grpc.ServicerContext) -> None:
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in self.details:
            packed = Any()
            packed.Pack(detail)
            status.details.append(packed)
        context.set_trailing_metadata([("grpc-status-details-bin", status.SerializeToString())])
        context.abort(self.code, self.message)


def whole_answer(index: int = 0) -> list[dict[str, object]]:
    """The events of one choice."""
    deltas = [{"delta": messages_pb2.Delta(index=index, text=word, offset=i, token_ids=[i])} for i, word in enumerate(WORDS)]
    finish = messages_pb2.Finish(index=index, finish_reason=messages_pb2.FINISH_REASON_STOP, completion_tokens=len(WORDS))
    return [*deltas, {"finish": finish}]


USAGE = {"usage": messages_pb2.Usage(prompt_tokens=3, completion_tokens=4, total_tokens=7)}


class Script(service_pb2_grpc.MantaServiceServicer):
    """Answers "The sky is blue" to everything, after the refusals it was told to begin with."""

    def __init__(self) -> None:
        self.refusals: list[Refusal] = []
        self.models = ["qwen2"]
        self.events: list[dict[str, object]] = [*whole_answer(), USAGE]
        self.next_events: list[dict[str, object]] | None = None
        """What streams after the first say, if something else."""
        self.pause_before: dict[int, threading.Event] = {}
        """Number of the event to hold back, and what to wait for."""
        self.calls: list[tuple[str, object, dict[str, str]]] = []
        self.streaming, self.cancelled = threading.Event(), threading.Event()

    def requests(self, method: str) -> list[object]:
        return [request for name, request, _ in self.calls if name == method]

    def _take(self, method: str, request: object, context: grpc.ServicerContext) -> None:
        self.calls.append((method, request, dict(context.invocation_metadata())))
        if self.refusals and method != "ListModels":
            self.refusals.pop(0).tell(context)

    def Chat(self, request, context):
        self._take("Chat", request, context)
        message = messages_pb2.Message(role=messages_pb2.ROLE_ASSISTANT, content="".join(WORDS))
        choice = messages_pb2.ChatChoice(message=message, finish_reason=messages_pb2.FINISH_REASON_STOP, token_ids=range(len(WORDS)))
        return service_pb2.ChatResponse(id="chatcmpl-7", model=request.model, choices=[choice], **USAGE)

    def Generate(self, request, context):
        self._take("Generate", request, context)
        choice = messages_pb2.GenerateChoice(
            text="".join(WORDS), finish_reason=messages_pb2.FINISH_REASON_LENGTH, stop_reason=messages_pb2.StopReason(stop="x")
        )
        return service_pb2.GenerateResponse(id="cmpl-7", model=request.model, choices=[choice], **USAGE)

    def ChatStream(self, request, context):
        self._take("ChatStream", request, context)
        yield from self._stream(service_pb2.ChatStreamResponse, context)

    def GenerateStream(self, request, context):
        self._take("GenerateStream", request, context)
        yield from self._stream(service_pb2.GenerateStreamResponse, context)

    def _stream(self, response, context):
        context.add_callback(self.cancelled.set)
        events = self.events
        self.events = self.next_events or self.events
        for number, event in enumerate(events):
            if number == 1:
                self.streaming.set()
            if number in self.pause_before:
                self.pause_before[number].wait(timeout=10)
            yield response(id="chatcmpl-7", **event)

    def ListModels(self, request, context):
        self._take("ListModels", request, context)
        return service_pb2.ListModelsResponse(models=[messages_pb2.Model(id=name, max_model_len=64) for name in self.models])

    def GetModel(self, request, context):
        self._take("GetModel", request, context)
        if request.model not in self.models:
            Refusal(grpc.StatusCode.NOT_FOUND, "no such model", param="model").tell(context)
        return service_pb2.GetModelResponse(model=messages_pb2.Model(id=request.model, max_model_len=64))


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def endpoint(script: Script) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    service_pb2_grpc.add_MantaServiceServicer_to_server(script, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"grpc://127.0.0.1:{port}"
    for held in script.pause_before.values():
        held.set()
    server.stop(grace=None).wait(timeout=5)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MANTA_ENDPOINT", raising=False)
    monkeypatch.delenv("MANTA_API_KEY", raising=False)
