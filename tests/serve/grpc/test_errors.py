import pickle
from types import SimpleNamespace

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo
from grpc_status import rpc_status
from ray.serve.grpc_util import RayServegRPCContext

from engine.errors import PromptTooLong, QueueFull
from serve.errors import ERROR_MAPPINGS, InvalidRequest, code_of
from serve.grpc.decode_errors import UndecodableMessage
from serve.grpc.errors import DETAILS_KEY, refuse
from serve.grpc.generated import service_pb2
from serve.grpc.servicer import MantaServicer
from serve.limits import Limits
from tests.serve.grpc.conftest import ScriptedService
from tests.serve.grpc.test_servicer import CHAT, STREAMS


def details_of(status) -> dict[type, object]:
    found = {}
    for packed in status.details:
        for kind in (BadRequest, ErrorInfo, RequestInfo, RetryInfo):
            if packed.Is(kind.DESCRIPTOR):
                found[kind] = kind()
                packed.Unpack(found[kind])
    return found


async def finished(call) -> list:
    """What came, once nothing more comes."""
    return [response async for response in call] if hasattr(call, "__aiter__") else [await call]


async def failed(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await finished(call)
    return caught.value


def calls(stub) -> dict:
    return {"Chat": lambda: stub.Chat(CHAT), "ChatStream": lambda: stub.ChatStream(STREAMS["ChatStream"])}


@pytest.mark.parametrize("method", ["Chat", "ChatStream"])
async def test_a_bad_value_is_named(stub, service: ScriptedService, method: str) -> None:
    service.fails_at, service.error = 0, InvalidRequest("temperature must be between 0 and 2", param="temperature")
    error = await failed(calls(stub)[method]())
    details = details_of(rpc_status.from_call(error))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details[BadRequest].field_violations[0].field == "temperature"
    assert (details[ErrorInfo].reason, details[ErrorInfo].domain) == ("INVALID_VALUE", "manta")
    assert details[RequestInfo].request_id == service.asked[0].request_id
    assert RetryInfo not in details


@pytest.mark.parametrize("method", ["Chat", "ChatStream"])
async def test_a_full_house_says_when_to_come_back(stub, service: ScriptedService, method: str) -> None:
    service.fails_at, service.error = 0, QueueFull(limit=8, retry_after_s=2.5)
    error = await failed(calls(stub)[method]())
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details_of(rpc_status.from_call(error))[RetryInfo].retry_delay.ToMilliseconds() == 2500


@pytest.mark.parametrize("method", ["Chat", "ChatStream"])
async def test_an_unknown_error_keeps_its_text_in_the_house(stub, service: ScriptedService, method: str) -> None:
    service.fails_at = 1
    error = await failed(calls(stub)[method]())
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(error)
    assert all(b"secret" not in (value if isinstance(value, bytes) else value.encode()) for _, value in error.trailing_metadata())


async def test_a_stream_tells_its_error_as_its_last_event_too(stub, service: ScriptedService) -> None:
    service.fails_at, service.error = 2, PromptTooLong(num_tokens=9, limit_tokens=8)
    call, responses = stub.ChatStream(STREAMS["ChatStream"]), []

    async def read() -> None:
        async for response in call:
            responses.append(response)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read()
    assert [response.WhichOneof("event") for response in responses] == ["delta", "delta", "error"]
    told = responses[-1].error
    assert (told.code, told.message) == (caught.value.code().value[0], caught.value.details())
    assert told.reason == "CONTEXT_LENGTH_EXCEEDED"


async def test_a_prompt_of_nothing_is_refused_before_the_service_is_asked(stub, service: ScriptedService) -> None:
    error = await failed(stub.Generate(service_pb2.GenerateRequest(model="tiny", prompts=[{}])))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert service.asked == []


async def test_a_request_over_the_limit_is_refused_by_the_servicer_too(stub, service: ScriptedService) -> None:
    """Behind Ray Serve's proxy nothing else looks at its size."""
    service.limits = Limits(body_bytes=CHAT.ByteSize())
    await stub.Chat(CHAT)
    service.limits = Limits(body_bytes=CHAT.ByteSize() - 1)
    error = await failed(stub.ChatStream(STREAMS["ChatStream"]))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details_of(rpc_status.from_call(error))[ErrorInfo].reason == "REQUEST_TOO_LARGE"
    assert len(service.asked) == 1


async def test_a_long_message_in_any_script_fits_into_the_trailers(stub, service: ScriptedService) -> None:
    service.fails_at, service.error = 0, InvalidRequest("語" * 5_000, param="stop")
    error = await failed(stub.Chat(CHAT))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert set(error.details()) == {"語"}


@pytest.mark.parametrize("kind", ERROR_MAPPINGS, ids=lambda kind: kind.__name__)
def test_every_error_of_the_table_has_a_grpc_code(kind: type[BaseException]) -> None:
    assert grpc.StatusCode[ERROR_MAPPINGS[kind].grpc] is not grpc.StatusCode.OK


def test_under_ray_serve_the_refusal_travels_on_the_context() -> None:
    """As its proxy does: the context is pickled with the message and then set on the real one, which already has a request id."""
    real = SimpleNamespace(
        auth_context=dict,
        code=lambda: 0,
        details=lambda: "",
        invocation_metadata=lambda: (("user-agent", "x"),),
        peer=lambda: "ipv4:127.0.0.1:1",
        peer_identities=lambda: None,
        peer_identity_key=lambda: None,
        trailing_metadata=lambda: (),
    )
    context = RayServegRPCContext(real)
    context.set_trailing_metadata([("request_id", "ray-1")])
    refuse(context, QueueFull(limit=8), "chatcmpl-1")
    arrived: dict[str, object] = {}
    for name in ("set_code", "set_details", "set_trailing_metadata"):
        setattr(real, name, lambda value, name=name: arrived.update({name: value}))
    pickle.loads(pickle.dumps(context))._set_on_grpc_context(real)
    trailers = dict(arrived["set_trailing_metadata"])
    assert arrived["set_code"] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert trailers["request_id"] == "ray-1"
    assert DETAILS_KEY in trailers


async def test_each_refusal_is_told_once() -> None:
    """For `manta_invalid_requests`."""
    told: list[str] = []
    servicer = MantaServicer(ScriptedService(), on_error=lambda error: told.append(code_of(error)))  # type: ignore[arg-type]

    class Context:
        def invocation_metadata(self) -> list[tuple[str, str]]:
            return [("idempotency-key", "a b")]

        def set_code(self, code: grpc.StatusCode) -> None: ...

        def set_details(self, details: str) -> None: ...

        def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str | bytes]]) -> None: ...

    chat = service_pb2.ChatRequest(model="none such")
    await servicer.Chat(chat, Context())
    assert [each async for each in servicer.ChatStream(service_pb2.ChatStreamRequest(request=chat), Context())]
    await servicer.GetModel(service_pb2.GetModelRequest(model="none such"), Context())
    await servicer.Chat(UndecodableMessage(), Context())  # type: ignore[arg-type]
    assert told == ["invalid_value", "invalid_value", "model_not_found", "invalid_value"]
