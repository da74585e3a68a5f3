"""The servicer over real gRPC, with a scripted service behind it."""

import asyncio
import time

import grpc
import pytest

from serve.grpc.generated import messages_pb2, service_pb2
from tests.serve.grpc.conftest import ScriptedService, answer

CHAT = service_pb2.ChatRequest(model="tiny", messages=[messages_pb2.Message(role=messages_pb2.ROLE_USER, content="Hi")])
GENERATE = service_pb2.GenerateRequest(model="tiny", prompts=[messages_pb2.Prompt(text="Hi")])
STREAMS = {
    "ChatStream": service_pb2.ChatStreamRequest(request=CHAT),
    "GenerateStream": service_pb2.GenerateStreamRequest(request=GENERATE),
}


async def test_a_chat_is_answered_whole(stub, service: ScriptedService) -> None:
    response = await stub.Chat(CHAT)
    (choice,) = response.choices
    assert (response.model, choice.message.content, choice.message.role) == ("tiny", "Hé!", messages_pb2.ROLE_ASSISTANT)
    assert (choice.finish_reason, choice.stop_reason.WhichOneof("reason")) == (messages_pb2.FINISH_REASON_STOP, None)
    assert list(choice.token_ids) == [1, 2, 3]
    assert response.usage == messages_pb2.Usage(prompt_tokens=3, completion_tokens=3, total_tokens=6, cached_tokens=2)
    assert response.id == service.asked[0].request_id
    assert response.id.startswith("chatcmpl-")
    assert abs(response.created - time.time()) < 60


async def test_a_prompt_is_gone_on_with_and_what_stopped_it_is_told(stub, service: ScriptedService) -> None:
    service.events[2:3] = answer(stop_reason="!")[2:]
    response = await stub.Generate(GENERATE)
    assert response.choices[0].text == "Hé!"
    assert response.choices[0].stop_reason.stop == "!"


@pytest.mark.parametrize("method", STREAMS)
async def test_a_stream_has_deltas_then_a_counted_finish_then_usage(stub, method: str) -> None:
    responses = [response async for response in getattr(stub, method)(STREAMS[method])]
    assert [response.WhichOneof("event") for response in responses] == ["delta", "delta", "delta", "finish", "usage"]
    deltas = [response.delta for response in responses[:3]]
    assert [(delta.text, delta.offset, list(delta.token_ids)) for delta in deltas] == [("H", 0, [1]), ("é", 1, [2, 3]), ("!", 3, [])]
    assert responses[3].finish.completion_tokens == 3
    assert responses[4].usage.total_tokens == 6
    assert len({response.id for response in responses}) == 1


async def test_choices_are_counted_apart(stub, service: ScriptedService) -> None:
    one, other = answer(0), answer(1, stop_reason=7)
    service.events = [one[0], other[0], other[1], one[1], other[2], one[2], service.events[-1]]
    responses = [response async for response in stub.ChatStream(STREAMS["ChatStream"])]
    for index in (0, 1):
        deltas = [response.delta for response in responses if response.WhichOneof("event") == "delta" and response.delta.index == index]
        assert "".join(delta.text for delta in deltas) == "Hé!"
        assert [delta.offset for delta in deltas] == [0, 1, 3]
    finishes = {response.finish.index: response.finish for response in responses if response.WhichOneof("event") == "finish"}
    assert finishes[1].stop_reason.stop_token_id == 7
    assert not finishes[0].HasField("stop_reason")


async def test_log_probabilities_come_with_bytes_and_alternatives(stub) -> None:
    first = await anext(aiter(stub.ChatStream(STREAMS["ChatStream"])))
    (logprob,) = first.delta.logprobs
    assert (logprob.token_id, logprob.token, logprob.bytes, logprob.logprob) == (1, "H", b"H", -0.5)
    assert [(top.token, top.logprob) for top in logprob.top_logprobs] == [("H", -0.5), ("x", -2.0)]


async def test_models_are_listed_and_found(stub) -> None:
    (model,) = (await stub.ListModels(service_pb2.ListModelsRequest())).models
    assert (model.id, model.max_model_len, model.created, model.root, model.parent) == ("tiny", 64, 1_700_000_000, "tiny", "")
    assert (await stub.GetModel(service_pb2.GetModelRequest(model="tiny"))).model == model
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetModel(service_pb2.GetModelRequest(model="../../etc/passwd"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("method", STREAMS)
async def test_cancelling_a_stream_ends_the_work(stub, service: ScriptedService, method: str) -> None:
    service.holds_at = 1
    call = getattr(stub, method)(STREAMS[method])
    assert (await anext(aiter(call))).delta.text == "H"
    await service.holding.wait()
    assert not service.closed.is_set()
    call.cancel()
    await asyncio.wait_for(service.closed.wait(), 60)


async def test_cancelling_a_whole_answer_ends_the_work(stub, service: ScriptedService) -> None:
    service.holds_at = 1
    call = stub.Chat(CHAT)
    waiting = asyncio.ensure_future(call)
    await asyncio.wait_for(service.holding.wait(), 60)
    call.cancel()
    await asyncio.wait_for(service.closed.wait(), 60)
    with pytest.raises(asyncio.CancelledError):
        await waiting


@pytest.mark.parametrize("method", ["Chat", "ChatStream"])
async def test_a_deadline_reaches_the_service_and_ends_the_work(stub, service: ScriptedService, method: str) -> None:
    service.holds_at = 1
    before = time.time()
    call = stub.Chat(CHAT, timeout=0.5) if method == "Chat" else stub.ChatStream(STREAMS[method], timeout=0.5)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call if method == "Chat" else anext_after_first(call))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(service.closed.wait(), 60)
    assert service.asked[0].deadline_s == pytest.approx(before + 0.5, abs=0.4)


async def anext_after_first(call) -> None:
    events = aiter(call)
    await anext(events)
    await anext(events)


async def test_without_a_deadline_the_service_gets_none(stub, service: ScriptedService) -> None:
    await stub.Chat(CHAT)
    assert service.asked[0].deadline_s is None


async def test_a_message_over_the_limit_is_refused_unread(stub, service: ScriptedService) -> None:
    huge = service_pb2.GenerateRequest(model="tiny", prompts=[messages_pb2.Prompt(text="x" * (5 << 20))])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(huge)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "larger than 4194304 bytes" in (caught.value.details() or "")
    assert service.asked == []
