"""Token ids over gRPC are those that the engine gets."""

from collections.abc import AsyncIterator

import grpc
import pytest

from serve.grpc.generated import service_pb2, service_pb2_grpc
from serve.text.tokenizer import Tokenizer
from tests.serve.in_process import MODEL, Fronts

TEXT = "Grüße, 世界! 🙂 <|im_end|>"


@pytest.fixture
async def stub(both: Fronts) -> AsyncIterator[service_pb2_grpc.MantaServiceStub]:
    async with grpc.aio.insecure_channel(both.grpc.removeprefix("grpc://")) as channel:
        yield service_pb2_grpc.MantaServiceStub(channel)


async def test_a_text_is_tokenized_as_a_prompt_is_and_comes_back(stub, tiny_folder) -> None:
    answer = await stub.Tokenize(service_pb2.TokenizeRequest(model=MODEL, text=TEXT, return_tokens=True))
    tokenizer = Tokenizer.from_folder(tiny_folder)
    assert tuple(answer.token_ids) == tokenizer.encode(TEXT)
    assert len(answer.tokens) == len(answer.token_ids)
    assert answer.tokens[-1] == "<|im_end|>"
    assert answer.max_model_len == 1024
    back = await stub.Detokenize(service_pb2.DetokenizeRequest(model=MODEL, token_ids=answer.token_ids))
    assert back.text == TEXT.removesuffix("<|im_end|>")


async def test_a_conversation_has_as_many_tokens_as_its_answers_usage_says(both: Fronts, stub) -> None:
    messages = [{"role": "ROLE_USER", "content": "Hi <|im_end|>"}]
    answer = await stub.Tokenize(service_pb2.TokenizeRequest(model=MODEL, conversation={"messages": messages}))
    chat = await stub.Chat(service_pb2.ChatRequest(model=MODEL, messages=messages, options={"max_tokens": 1}))
    assert len(answer.token_ids) == chat.usage.prompt_tokens
    assert not answer.tokens


@pytest.mark.parametrize(
    ("method", "request_message", "field"),
    [
        ("Tokenize", service_pb2.TokenizeRequest(model=MODEL), "input"),
        ("Tokenize", service_pb2.TokenizeRequest(model=MODEL, conversation={}), "messages"),
        ("Tokenize", service_pb2.TokenizeRequest(model="../x", text="Hi"), "model"),
        ("Detokenize", service_pb2.DetokenizeRequest(model=MODEL, token_ids=[-1]), "tokens"),
        ("Detokenize", service_pb2.DetokenizeRequest(model=MODEL, token_ids=[10**6]), "tokens"),
    ],
)
async def test_what_cannot_be_tokenized_is_refused(stub, method: str, request_message, field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(stub, method)(request_message)
    expected = grpc.StatusCode.NOT_FOUND if field == "model" else grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.code() is expected
    assert field.encode() in dict(caught.value.trailing_metadata())["grpc-status-details-bin"]
