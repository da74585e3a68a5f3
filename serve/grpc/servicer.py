"""Steps 1 and 2 of a request over gRPC: take the call, ask the service, answer; the call's end reaches the service here too.

The methods run under a plain `grpc.aio` server and, delegated to by the front's deployment, under Ray Serve's proxy.
A client's cancel or deadline arrives as `asyncio.CancelledError`, which leaves through `aclosing` and so cancels the
request at its source.
"""

import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

from google.protobuf.message import Message

from engine.request_trace import trace_place
from serve.auth import OpenDoor
from serve.caller import Caller, Scope
from serve.errors import RequestTooLarge
from serve.grpc.auth import Admits, caller_of
from serve.grpc.errors import CallContext, refuse
from serve.grpc.generated import service_pb2, service_pb2_grpc
from serve.grpc.requests import chat_request, check_counts, completion_request, embedding_request, parse_so_far, tokenize_request
from serve.grpc.responses import StreamWriter, chat_response, embed_response, generate_response, model_message
from serve.grpc.timing import tell_ledger
from serve.idempotency import KEY, key_of
from serve.request import ChatRequest, CompletionRequest, EmbeddingRequest, SoFar, TextEvent
from serve.service_api import Offers
from serve.session import SESSION, session_of
from serve.trace_context import trace_of

Response = TypeVar("Response", bound=Message)
StreamResponse = TypeVar("StreamResponse", service_pb2.ChatStreamResponse, service_pb2.GenerateStreamResponse)


class MantaServicer(service_pb2_grpc.MantaServiceServicer):
    def __init__(self, service: Offers, *, door: Admits | None = None, clock: Callable[[], float] = time.time) -> None:
        self._service, self._door, self._clock = service, door or OpenDoor(), clock

    async def Chat(self, request: service_pb2.ChatRequest, context: CallContext) -> service_pb2.ChatResponse:
        request_id = _take("chatcmpl")

        async def answer() -> service_pb2.ChatResponse:
            asked = self._chat_request(request, request_id, context)
            result = await self._service.collect(asked)
            trace_place(14, request_id)
            tell_ledger(context, result.ledger, result.held_s)
            return chat_response(result, model=asked.model, created=int(self._clock()))

        return await answer_or_refuse(answer, service_pb2.ChatResponse, context, request_id)

    async def ChatStream(
        self, request: service_pb2.ChatStreamRequest, context: CallContext
    ) -> AsyncGenerator[service_pb2.ChatStreamResponse, None]:
        request_id = _take("chatcmpl")

        def begin() -> tuple[AsyncGenerator[TextEvent, None], Sequence[SoFar]]:
            asked, so_far = self._chat_request(request.request, request_id, context), self._so_far(request)
            return self._service.chat(dataclasses.replace(asked, so_far=so_far)), so_far

        stream = _stream_or_refuse(begin, service_pb2.ChatStreamResponse, context, request_id)
        async with aclosing(stream) as responses:
            async for response in responses:
                yield response

    async def Generate(self, request: service_pb2.GenerateRequest, context: CallContext) -> service_pb2.GenerateResponse:
        request_id = _take("cmpl")

        async def answer() -> service_pb2.GenerateResponse:
            asked = self._completion_request(request, request_id, context)
            result = await self._service.collect(asked)
            trace_place(14, request_id)
            tell_ledger(context, result.ledger, result.held_s)
            return generate_response(result, model=asked.model, created=int(self._clock()))

        return await answer_or_refuse(answer, service_pb2.GenerateResponse, context, request_id)

    async def GenerateStream(
        self, request: service_pb2.GenerateStreamRequest, context: CallContext
    ) -> AsyncGenerator[service_pb2.GenerateStreamResponse, None]:
        request_id = _take("cmpl")

        def begin() -> tuple[AsyncGenerator[TextEvent, None], Sequence[SoFar]]:
            asked, so_far = self._completion_request(request.request, request_id, context), self._so_far(request)
            return self._service.complete(dataclasses.replace(asked, so_far=so_far)), so_far

        stream = _stream_or_refuse(begin, service_pb2.GenerateStreamResponse, context, request_id)
        async with aclosing(stream) as responses:
            async for response in responses:
                yield response

    async def Embed(self, request: service_pb2.EmbedRequest, context: CallContext) -> service_pb2.EmbedResponse:
        request_id = _take("embd")

        async def answer() -> service_pb2.EmbedResponse:
            asked = self._embedding_request(request, request_id, context)
            result = await self._service.embed(asked)
            trace_place(14, request_id)
            tell_ledger(context, result.ledger, result.held_s)
            return embed_response(result, model=asked.model, created=int(self._clock()))

        return await answer_or_refuse(answer, service_pb2.EmbedResponse, context, request_id)

    async def ListModels(self, request: service_pb2.ListModelsRequest, context: CallContext) -> service_pb2.ListModelsResponse:
        async def answer() -> service_pb2.ListModelsResponse:
            caller_of(context, self._door, Scope.INFER)
            return service_pb2.ListModelsResponse(models=[model_message(facts) for facts in self._service.models()])

        return await answer_or_refuse(answer, service_pb2.ListModelsResponse, context)

    async def GetModel(self, request: service_pb2.GetModelRequest, context: CallContext) -> service_pb2.GetModelResponse:
        async def answer() -> service_pb2.GetModelResponse:
            caller_of(context, self._door, Scope.INFER)
            return service_pb2.GetModelResponse(model=model_message(self._service.model(request.model)))

        return await answer_or_refuse(answer, service_pb2.GetModelResponse, context)

    async def Tokenize(self, request: service_pb2.TokenizeRequest, context: CallContext) -> service_pb2.TokenizeResponse:
        async def answer() -> service_pb2.TokenizeResponse:
            caller_of(context, self._door, Scope.INFER)
            self._fits(request)
            ids = await self._service.tokenize(tokenize_request(request))
            texts = await self._service.token_texts(request.model, ids) if request.return_tokens else ()
            facts = self._service.model(request.model)
            return service_pb2.TokenizeResponse(token_ids=ids, tokens=texts, max_model_len=facts.max_context_tokens)

        return await answer_or_refuse(answer, service_pb2.TokenizeResponse, context)

    async def Detokenize(self, request: service_pb2.DetokenizeRequest, context: CallContext) -> service_pb2.DetokenizeResponse:
        async def answer() -> service_pb2.DetokenizeResponse:
            caller_of(context, self._door, Scope.INFER)
            self._fits(request)
            return service_pb2.DetokenizeResponse(text=await self._service.detokenize(request.model, tuple(request.token_ids)))

        return await answer_or_refuse(answer, service_pb2.DetokenizeResponse, context)

    def _chat_request(self, message: service_pb2.ChatRequest, request_id: str, context: CallContext) -> ChatRequest:
        caller, session = self._admit(message, request_id, context), self._session(context)
        request = chat_request(message, request_id=request_id, deadline_s=self._deadline_s(context), session=session)
        return dataclasses.replace(
            request, caller=caller, idempotency_key=self._key(context), trace=trace_of(context.invocation_metadata() or ())
        )

    def _completion_request(self, message: service_pb2.GenerateRequest, request_id: str, context: CallContext) -> CompletionRequest:
        caller, session = self._admit(message, request_id, context), self._session(context)
        request = completion_request(message, request_id=request_id, deadline_s=self._deadline_s(context), session=session)
        return dataclasses.replace(
            request, caller=caller, idempotency_key=self._key(context), trace=trace_of(context.invocation_metadata() or ())
        )

    def _embedding_request(self, message: service_pb2.EmbedRequest, request_id: str, context: CallContext) -> EmbeddingRequest:
        caller, session = self._admit(message, request_id, context), self._session(context)
        request = embedding_request(message, request_id=request_id, deadline_s=self._deadline_s(context), session=session)
        return dataclasses.replace(
            request, caller=caller, idempotency_key=self._key(context), trace=trace_of(context.invocation_metadata() or ())
        )

    def _so_far(self, message: service_pb2.ChatStreamRequest | service_pb2.GenerateStreamRequest) -> tuple[SoFar, ...]:
        self._fits(message)
        return parse_so_far(message.so_far)

    def _admit(self, message: Message, request_id: str, context: CallContext) -> Caller:
        """Step 2."""
        caller = caller_of(context, self._door, Scope.INFER)
        trace_place(2, request_id)
        self._fits(message)
        return caller

    def _fits(self, message: Message) -> None:
        """Checked here so that the refusal says why: Ray Serve's gRPC server has one limit, for answers as well."""
        limits = self._service.limits
        if message.ByteSize() > limits.body_bytes:
            raise RequestTooLarge(limit_bytes=limits.body_bytes)
        check_counts(message, limits)

    def _session(self, context: CallContext) -> str:
        return session_of(_said(context, SESSION), None, self._service.limits)

    def _key(self, context: CallContext) -> str:
        return key_of(_said(context, KEY), self._service.limits)

    def _deadline_s(self, context: CallContext) -> float | None:
        """Unix time of the client's deadline. Ray Serve's context does not know it: there only the cancel tells."""
        time_remaining = getattr(context, "time_remaining", None)
        remaining_s = time_remaining() if time_remaining else None
        return None if remaining_s is None else self._clock() + remaining_s


def _said(context: CallContext, name: str) -> str | None:
    """What the client's metadata say under a name."""
    return {key: value for key, value in context.invocation_metadata() or () if key == name}.get(name)


def _take(kind: str) -> str:
    """A new request's id."""
    request_id = f"{kind}-{uuid.uuid4().hex}"
    trace_place(1, request_id)
    return request_id


async def answer_or_refuse(
    answer: Callable[[], Awaitable[Response]], response: type[Response], context: CallContext, request_id: str = ""
) -> Response:
    """The answer of a call that has one; if it fails, an empty one and the refusal in ``context``."""
    try:
        return await answer()
    except Exception as error:
        refuse(context, error, request_id)
        return response()


async def _stream_or_refuse(
    begin: Callable[[], tuple[AsyncGenerator[TextEvent, None], Sequence[SoFar]]],
    response: type[StreamResponse],
    context: CallContext,
    request_id: str,
) -> AsyncGenerator[StreamResponse, None]:
    told, held_s = False, 0.0
    try:
        stream, so_far = begin()
        writer = StreamWriter(so_far)
        async with aclosing(stream) as events:
            async for event in events:
                held_s = max(held_s, event.held_s)
                tell_ledger(context, event.ledger, held_s)
                for fields in writer.events(event):
                    if not told:
                        told = True
                        trace_place(14, request_id)
                    yield response(id=request_id, **fields)  # type: ignore[arg-type]
    except Exception as error:
        yield response(id=request_id, error=refuse(context, error, request_id))
