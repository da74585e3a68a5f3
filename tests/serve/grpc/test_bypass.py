"""What a client gets past Ray over gRPC is what it would get through Ray, status and trailers too; what is missing never goes unnoticed.

The ends of the bypass themselves, sockets that fail and hosts that differ, are in `tests/serve/http/test_bypass.py`.
"""

import asyncio
import pickle
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc.status_pb2 import Status

import serve.bypass
from cluster.bypass import ChunksLost, Sender, new_answer_number
from serve.bypass import HEADER, BypassStream, FrontEndpoint, ProxyEndpoint
from serve.errors import InvalidRequest
from serve.grpc.bypass import BypassSignal, receive_past_ray, send_past_ray
from serve.grpc.errors import DETAILS_KEY
from serve.grpc.generated import service_pb2
from serve.grpc.servicer import MantaServicer
from serve.grpc.slow_clients import abort_slow_clients
from serve.request import TextEvent
from tests.serve.grpc.conftest import USAGE, ScriptedService, answer

NODE = "a-node"


@pytest.fixture(autouse=True)
def short_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/tmp")


class Call:
    """A call's context, in the proxy and, pickled, in the front: as `RayServegRPCContext` has it."""

    def __init__(self, *metadata: tuple[str, str]) -> None:
        self._metadata, self._code, self._details, self.trailers = metadata, None, "", []  # type: ignore[var-annotated]
        self.is_over = False

    def peer(self) -> str:
        assert not self.is_over, "grpcio would end the process"
        return "ipv4:192.0.2.7:4711"

    def invocation_metadata(self) -> Any:
        return self._metadata

    def code(self) -> Any:
        return self._code

    def set_code(self, code: grpc.StatusCode) -> None:
        self._code = code  # type: ignore[assignment]

    def set_details(self, details: str) -> None:
        self._details = details

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        self.trailers = list(trailing_metadata)


class Between:
    """Ray Serve between proxy and front: messages and the call's state are pickled, and come when they like; a front that fails is a
    status, and who is cancelled while waiting cancels the front."""

    def __init__(self, front: Callable[[Any, Any], AsyncGenerator[Any, None]], delays: random.Random | None = None) -> None:
        self._front, self._delays, self.num_messages, self.is_over = front, delays, 0, False
        self.running: asyncio.Task[None] | None = None
        self.seen: list[Any] = []

    async def __call__(self, request: Any, context: Any) -> AsyncGenerator[bytes, None]:
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        far = Call(*context.invocation_metadata())
        self.seen = list(far.invocation_metadata())

        async def run() -> None:
            try:
                async for message in self._front(request, far):
                    queue.put_nowait(pickle.dumps((far.__dict__, message.SerializeToString())))
            finally:
                queue.put_nowait(None)

        self.running = running = asyncio.create_task(run())
        try:
            while (raw := await queue.get()) is not None:
                await self._pause()
                state, message = pickle.loads(raw)
                if state["_code"]:
                    context.set_code(state["_code"])
                    context.set_details(state["_details"])
                if state["trailers"]:
                    context.set_trailing_metadata(state["trailers"])
                self.num_messages += BypassSignal.parse(message) is None
                yield message
            await running
        except asyncio.CancelledError:
            running.cancel()
            context.set_code(grpc.StatusCode.CANCELLED)
        except Exception:
            context.set_code(far.code() or grpc.StatusCode.UNAVAILABLE)
        else:
            if not context.code():
                context.set_code(grpc.StatusCode.OK)
        finally:
            self.is_over = True

    async def _pause(self) -> None:
        if self._delays is not None:
            await asyncio.sleep(self._delays.choice((0, 0, 0.001, 0.01)))


def front(service: ScriptedService, bypass: FrontEndpoint | None) -> Callable[[Any, Any], AsyncGenerator[Any, None]]:
    """The front's method, as `serve.deployment` has it, or without the bypass."""
    servicer = MantaServicer(service)  # type: ignore[arg-type]

    def chat_stream(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        responses = servicer.ChatStream(request, context)
        return responses if bypass is None else send_past_ray(responses, context, bypass)

    return chat_stream


def past(ray: Between, endpoint: ProxyEndpoint) -> Any:
    return receive_past_ray(grpc.unary_stream_rpc_method_handler(ray), endpoint).unary_stream


Told = tuple[list[service_pb2.ChatStreamResponse], Call]


async def asked(stream: Any, *metadata: tuple[str, str]) -> Told:
    """What a client is sent, its id left out, and how the call ended."""
    call, sent = Call(*metadata), []
    async for message in stream(service_pb2.ChatStreamRequest(request={"model": "tiny"}), call):
        await asyncio.sleep(0)
        sent.append(service_pb2.ChatStreamResponse.FromString(message))
        assert sent[-1].id.startswith("chatcmpl-")
        sent[-1].id = ""
    return sent, call


async def through_ray(service: ScriptedService) -> list[service_pb2.ChatStreamResponse]:
    return (await asked(Between(front(service, None))))[0]


async def acquaint(bypass: FrontEndpoint, endpoint: ProxyEndpoint) -> None:
    """The first request through a proxy goes by Ray, and has the front connect."""
    incoming = endpoint.open()
    assert incoming is not None
    told = endpoint.header_value(incoming)
    async with asyncio.timeout(60):
        while bypass.stream_for([told]) is None:  # noqa: ASYNC110  (zmq's threads have no event for it)
            await asyncio.sleep(0.001)
    incoming.close()


@pytest.fixture
async def endpoint() -> AsyncGenerator[ProxyEndpoint, None]:
    made = ProxyEndpoint(NODE)
    yield made
    if made._receiver is not None:
        assert not made._receiver._streams, "a stream that is over is forgotten"
        await made._receiver.close()


@pytest.fixture
async def bypass(endpoint: ProxyEndpoint) -> FrontEndpoint:
    made = FrontEndpoint(NODE)
    await acquaint(made, endpoint)
    return made


class Hesitant(ScriptedService):
    def __init__(self, delays: random.Random, num: int) -> None:
        super().__init__()
        self._delays = delays
        self.events = [*(answer(0)[0] for _ in range(num)), *answer(0), TextEvent(choice=0, usage=USAGE)]

    async def _events(self, request: Any) -> AsyncGenerator[TextEvent, None]:
        async for event in super()._events(request):
            await asyncio.sleep(self._delays.choice((0, 0, 0, 0.002)))
            yield event


@pytest.mark.parametrize("seed", range(6))
async def test_the_client_gets_the_same_messages_in_order_whatever_comes_first(
    seed: int, bypass: FrontEndpoint, endpoint: ProxyEndpoint
) -> None:
    delays = random.Random(seed)
    services = [Hesitant(delays, delays.randint(1, 40)) for _ in range(8)]
    between = [Between(front(service, bypass), delays) for service in services]
    answers = await asyncio.gather(*(asked(past(ray, endpoint)) for ray in between))
    for (sent, call), service in zip(answers, services, strict=True):
        assert sent == await through_ray(service)
        assert call.code() is grpc.StatusCode.OK
    assert not any(ray.num_messages for ray in between)


async def test_a_front_of_another_host_answers_by_ray(endpoint: ProxyEndpoint) -> None:
    service = ScriptedService()
    ray = Between(front(service, FrontEndpoint("another")))
    assert (await asked(past(ray, endpoint)))[0] == await through_ray(service)
    assert ray.num_messages == 5


async def test_a_front_without_a_bypass_answers_by_ray(endpoint: ProxyEndpoint) -> None:
    service = ScriptedService()
    ray = Between(front(service, None))
    assert (await asked(past(ray, endpoint)))[0] == await through_ray(service)
    assert ray.num_messages == 5


async def test_what_a_client_says_of_a_socket_reaches_no_front(bypass: FrontEndpoint, endpoint: ProxyEndpoint) -> None:
    forged, kept = (HEADER, f"{NODE} 0 ipc:///tmp/of-mine"), ("authorization", "Bearer a")
    ray = Between(front(ScriptedService(), bypass))
    await asked(past(ray, endpoint), forged, kept)
    assert kept in ray.seen
    assert forged not in ray.seen
    assert [key for key, _ in ray.seen].count(HEADER) == 1
    endpoint.pause("for the test")
    await asked(past(ray, endpoint), forged, kept)
    assert ray.seen == [kept]


async def test_a_refusal_before_and_in_the_midst_arrives_with_everything_it_says(bypass: FrontEndpoint, endpoint: ProxyEndpoint) -> None:
    service = ScriptedService()
    service.error = InvalidRequest("temperature must be between 0 and 2", param="temperature")
    for service.fails_at in (0, 2):
        ray = Between(front(service, bypass))
        sent, call = await asked(past(ray, endpoint))
        assert not ray.num_messages
        assert sent == await through_ray(service)
        assert (len(sent), sent[-1].error.param) == (service.fails_at + 1, "temperature")
        assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert Status.FromString(dict(call.trailers)[DETAILS_KEY]).message == sent[-1].error.message


async def test_a_chunk_that_is_missing_ends_the_stream_as_a_lost_front_does_and_those_after_it_go_by_ray(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, bypass: FrontEndpoint, endpoint: ProxyEndpoint
) -> None:
    monkeypatch.setattr(serve.bypass, "LATE_S", 0.2)
    service = ScriptedService()
    ray, whole = Between(front(service, bypass)), await through_ray(service)
    with monkeypatch.context() as patched:
        put = Sender.put
        patched.setattr(Sender, "put", lambda sender, answer, chunk: None if "é".encode() in chunk else put(sender, answer, chunk))
        sent, call = await asked(past(ray, endpoint))
        assert sent == [whole[0], *whole[2:]]
        assert call.code() is grpc.StatusCode.UNAVAILABLE, "as the death of its front"
        assert DETAILS_KEY in dict(call.trailers)
        assert not ray.num_messages
        assert await asked(past(ray, endpoint)) is not None
    assert ray.num_messages == len(whole)
    assert caplog.text.count("the bypass failed") == 1
    endpoint._paused_until = 0
    assert (await asked(past(ray, endpoint)))[0] == whole
    assert ray.num_messages == len(whole)


def dying(bypass: FrontEndpoint, *, number: int, fails: bool) -> Callable[[Any, Any], AsyncGenerator[Any, None]]:
    """A front that sends so many chunks and comes to no end."""

    async def responses(_request: Any, context: Any) -> AsyncGenerator[Any, None]:
        stream = bypass.stream_for([value for key, value in context.invocation_metadata() if key == HEADER])
        assert isinstance(stream, BypassStream)
        yield BypassSignal("begin", stream.answer)
        for place in range(number):
            stream.put(service_pb2.ChatStreamResponse(id="chatcmpl-1", delta={"text": str(place)}).SerializeToString())
        await asyncio.sleep(0.05)
        if fails:
            raise RuntimeError("lost")

    return responses


@pytest.mark.parametrize("number", [0, 3])
async def test_a_front_that_is_lost_is_a_status_behind_what_came(number: int, bypass: FrontEndpoint, endpoint: ProxyEndpoint) -> None:
    sent, call = await asked(past(Between(dying(bypass, number=number, fails=True)), endpoint))
    assert [message.delta.text for message in sent] == [str(place) for place in range(number)]
    assert call.code() is grpc.StatusCode.UNAVAILABLE
    assert endpoint.open() is not None, "which is no fault of the bypass"
    endpoint._receiver._streams.clear()  # type: ignore[union-attr]


async def test_a_stream_that_ends_well_without_an_end_is_not_taken_for_whole(bypass: FrontEndpoint, endpoint: ProxyEndpoint) -> None:
    sent, call = await asked(past(Between(dying(bypass, number=2, fails=False)), endpoint))
    assert len(sent) == 2
    assert call.code() is grpc.StatusCode.UNAVAILABLE
    assert DETAILS_KEY in dict(call.trailers)


async def test_a_front_whose_proxy_takes_nothing_any_more_says_that_it_was_lost(bypass: FrontEndpoint, endpoint: ProxyEndpoint) -> None:
    (sender,) = bypass._senders.values()
    service = ScriptedService()
    call = Call((HEADER, f"{NODE} 0 {endpoint._receiver.address}"))  # type: ignore[union-attr]
    responses = front(service, bypass)(service_pb2.ChatStreamRequest(request={"model": "tiny"}), call)
    assert BypassSignal.parse((await anext(responses)).SerializeToString()) is not None
    sender._is_broken = True
    with pytest.raises(ChunksLost):
        await anext(responses)
    assert call.code() is grpc.StatusCode.UNAVAILABLE
    assert service.closed.is_set()


async def test_a_stream_is_open_with_ray_until_its_client_has_all_of_it(bypass: FrontEndpoint, endpoint: ProxyEndpoint) -> None:
    """A proxy that is to go (its host is given back) waits for those."""
    ray = Between(front(ScriptedService(), bypass))
    messages = past(ray, endpoint)(service_pb2.ChatStreamRequest(request={"model": "tiny"}), Call())
    await anext(messages)
    assert ray.running is not None
    await asyncio.wait([ray.running])
    await asyncio.sleep(0.05)
    assert not ray.is_over
    assert len([message async for message in messages]) == 4
    assert ray.is_over


async def test_a_client_that_leaves_cancels_the_front_wherever_its_stream_is(bypass: FrontEndpoint, endpoint: ProxyEndpoint) -> None:
    for waits in (True, False):
        service = ScriptedService()
        service.holds_at = 2
        ray = Between(front(service, bypass))
        messages = past(ray, endpoint)(service_pb2.ChatStreamRequest(request={"model": "tiny"}), Call())
        async with asyncio.timeout(60):
            assert await anext(messages)
            if waits:
                assert await anext(messages)
                waiting = asyncio.ensure_future(anext(messages))
                await service.holding.wait()
                waiting.cancel()
                await asyncio.wait([waiting])
            else:  # gRPC is left with a message that it could not write
                await messages.aclose()
            await service.closed.wait()
        assert ray.running is not None
        await asyncio.wait([ray.running])
        assert ray.running.cancelled()
        assert not endpoint._receiver._streams  # type: ignore[union-attr]


async def test_a_client_that_does_not_read_is_left_and_its_front_cancelled(bypass: FrontEndpoint, endpoint: ProxyEndpoint) -> None:
    service, chunk = ScriptedService(), TextEvent(choice=0, text="a" * 8192)
    service.events, service.holds_at = [chunk] * 400, 399
    handler = grpc.unary_stream_rpc_method_handler(
        Between(front(service, bypass)), request_deserializer=service_pb2.ChatStreamRequest.FromString
    )
    server = grpc.aio.server()
    method = {"C": abort_slow_clients(receive_past_ray(handler, endpoint), 0.2)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("a.B", method)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel, asyncio.timeout(60):
        call = channel.unary_stream("/a.B/C")(service_pb2.ChatStreamRequest(request={"model": "tiny"}).SerializeToString())
        assert await call.read()
        await service.closed.wait()
        with pytest.raises(grpc.aio.AioRpcError, match="nothing of this stream was read"):
            await to_the_end(call)
    await server.stop(0)


async def to_the_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_of_two_answers_to_a_request_that_ray_routed_twice_only_the_one_that_began_is_handed_on(
    bypass: FrontEndpoint, endpoint: ProxyEndpoint
) -> None:
    service, other = ScriptedService(), ScriptedService()
    other.events = [TextEvent(choice=0, text="of another front"), *other.events]

    async def twice(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        async with aclosing(front(other, bypass)(request, Call(*context.invocation_metadata()))) as unheard:
            async for _ in unheard:
                pass
        async for message in front(service, bypass)(request, context):
            yield message

    ray = Between(twice)
    assert (await asked(past(ray, endpoint)))[0] == await through_ray(service)
    assert not ray.num_messages


async def test_the_peer_of_a_cancelled_stream_can_be_logged_when_the_call_is_over(bypass: FrontEndpoint, endpoint: ProxyEndpoint) -> None:
    """gRPC leaves the generator of a call that is cancelled while a message is sent, so it ends after the call, and Ray Serve logs then."""
    await acquaint(bypass, endpoint)
    service = ScriptedService()
    service.holds_at = 2
    ray, logged = Between(front(service, bypass)), list[str]()

    async def logging(request: Any, context: Any) -> AsyncGenerator[bytes, None]:
        async for message in ray(request, context):
            yield message
        logged.append(context.peer())

    call = Call()
    handler = abort_slow_clients(receive_past_ray(grpc.unary_stream_rpc_method_handler(logging), endpoint), 30.0)
    messages = handler.unary_stream(service_pb2.ChatStreamRequest(request={"model": "tiny"}), call)
    await anext(messages)
    call.is_over = True
    del messages
    async with asyncio.timeout(60):
        while not logged:  # noqa: ASYNC110 (the event loop closes the generator in a task of its own)
            await asyncio.sleep(0.001)
    assert logged == ["ipv4:192.0.2.7:4711"]


def test_calls_that_are_no_streams_are_left_alone(endpoint: ProxyEndpoint) -> None:
    unary = grpc.unary_unary_rpc_method_handler(lambda request, context: request)
    assert receive_past_ray(unary, endpoint) is unary


def test_no_message_of_ours_is_taken_for_a_signal_and_no_signal_for_a_message() -> None:
    for signal in (BypassSignal("begin", new_answer_number(7)), BypassSignal("end", 0)):
        raw = signal.SerializeToString()
        assert BypassSignal.parse(raw) == signal
        with pytest.raises(Exception, match="parsing"):
            service_pb2.ChatStreamResponse.FromString(raw)
    assert BypassSignal.parse(service_pb2.ChatStreamResponse(delta={"text": "\0begin 1"}).SerializeToString()) is None
    assert BypassSignal.parse(b"") is None
