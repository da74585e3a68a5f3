"""Places 1, 2 and 14 of a request over gRPC: receives the call, calls the service, sends the response.

The methods run under a plain `grpc.aio` server, and behind Ray Serve's proxy, where the front's deployment delegates to them. A
client's cancellation or deadline arrives as `asyncio.CancelledError`; it passes through `aclosing`, which cancels the request in the
service.
"""

import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

from google.protobuf.message import Message

from engine.request_trace import trace_place
from serve.auth import Authenticator, NoAuthentication
from serve.caller import Caller, Scope
from serve.errors import RequestTooLarge
from serve.grpc.auth import caller_of
from serve.grpc.errors import CallContext, refuse
from serve.grpc.generated import service_pb2, service_pb2_grpc
from serve.grpc.requests import chat_request, check_counts, completion_request, embedding_request, parse_so_far, tokenize_request
from serve.grpc.responses import StreamWriter, chat_response, embed_response, generate_response, model_message
from serve.grpc.timing import set_timing_trailers
from serve.idempotency import IDEMPOTENCY_KEY, parse_idempotency_key
from serve.request import ChatRequest, CompletionRequest, EmbeddingRequest, SoFar, TextEvent
from serve.service_api import ServiceApi
from serve.session import SESSION_HEADER, parse_session_id
from serve.trace_context import extract_trace

Response = TypeVar("Response", bound=Message)
StreamResponse = TypeVar("StreamResponse", service_pb2.ChatStreamResponse, service_pb2.GenerateStreamResponse)


class MantaServicer(service_pb2_grpc.MantaServiceServicer):
    """`manta.v1.MantaService`."""

    def __init__(
        self,
        service: ServiceApi,
        *,
        authenticator: Authenticator | None = None,
        clock: Callable[[], float] = time.time,
        on_error: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        """``on_error``: told of each error that a call is answered with."""
        self._service, self._authenticator, self._clock = service, authenticator or NoAuthentication(), clock
        self._on_error = on_error

    async def Chat(self, request: service_pb2.ChatRequest, context: CallContext) -> service_pb2.ChatResponse:
        request_id = _new_request_id("chatcmpl")

        async def answer() -> service_pb2.ChatResponse:
            chat = self._chat_request(request, request_id, context)
            result = await self._service.collect(chat)
            trace_place(14, request_id)
            set_timing_trailers(context, result.timing, result.held_s)
            return chat_response(result, model=chat.model, created=int(self._clock()))

        return await self._answer_or_refuse(answer, service_pb2.ChatResponse, context, request_id)

    async def ChatStream(
        self, request: service_pb2.ChatStreamRequest, context: CallContext
    ) -> AsyncGenerator[service_pb2.ChatStreamResponse, None]:
        request_id = _new_request_id("chatcmpl")

        def begin() -> tuple[AsyncGenerator[TextEvent, None], Sequence[SoFar]]:
            chat, so_far = self._chat_request(request.request, request_id, context), self._so_far(request)
            return self._service.chat(dataclasses.replace(chat, so_far=so_far)), so_far

        stream = _stream_or_refuse(begin, service_pb2.ChatStreamResponse, context, request_id, self._on_error)
        async with aclosing(stream) as responses:
            async for response in responses:
                yield response

    async def Generate(self, request: service_pb2.GenerateRequest, context: CallContext) -> service_pb2.GenerateResponse:
        request_id = _new_request_id("cmpl")

        async def answer() -> service_pb2.GenerateResponse:
            completion = self._completion_request(request, request_id, context)
            result = await self._service.collect(completion)
            trace_place(14, request_id)
            set_timing_trailers(context, result.timing, result.held_s)
            return generate_response(result, model=completion.model, created=int(self._clock()))

        return await self._answer_or_refuse(answer, service_pb2.GenerateResponse, context, request_id)

    async def GenerateStream(
        self, request: service_pb2.GenerateStreamRequest, context: CallContext
    ) -> AsyncGenerator[service_pb2.GenerateStreamResponse, None]:
        request_id = _new_request_id("cmpl")

        def begin() -> tuple[AsyncGenerator[TextEvent, None], Sequence[SoFar]]:
            completion, so_far = self._completion_request(request.request, request_id, context), self._so_far(request)
            return self._service.complete(dataclasses.replace(completion, so_far=so_far)), so_far

        stream = _stream_or_refuse(begin, service_pb2.GenerateStreamResponse, context, request_id, self._on_error)
        async with aclosing(stream) as responses:
            async for response in responses:
                yield response

    async def Embed(self, request: service_pb2.EmbedRequest, context: CallContext) -> service_pb2.EmbedResponse:
        request_id = _new_request_id("embd")

        async def answer() -> service_pb2.EmbedResponse:
            embedding = self._embedding_request(request, request_id, context)
            result = await self._service.embed(embedding)
            trace_place(14, request_id)
            set_timing_trailers(context, result.timing, result.held_s)
            return embed_response(result, model=embedding.model, created=int(self._clock()))

        return await self._answer_or_refuse(answer, service_pb2.EmbedResponse, context, request_id)

    async def ListModels(self, request: service_pb2.ListModelsRequest, context: CallContext) -> service_pb2.ListModelsResponse:
        async def answer() -> service_pb2.ListModelsResponse:
            caller_of(context, self._authenticator, Scope.INFER)
            return service_pb2.ListModelsResponse(models=[model_message(facts) for facts in self._service.models()])

        return await self._answer_or_refuse(answer, service_pb2.ListModelsResponse, context)

    async def GetModel(self, request: service_pb2.GetModelRequest, context: CallContext) -> service_pb2.GetModelResponse:
        async def answer() -> service_pb2.GetModelResponse:
            caller_of(context, self._authenticator, Scope.INFER)
            return service_pb2.GetModelResponse(model=model_message(self._service.model(request.model)))

        return await self._answer_or_refuse(answer, service_pb2.GetModelResponse, context)

    async def Tokenize(self, request: service_pb2.TokenizeRequest, context: CallContext) -> service_pb2.TokenizeResponse:
        async def answer() -> service_pb2.TokenizeResponse:
            caller_of(context, self._authenticator, Scope.INFER)
            self._check_size(request)
            ids = await self._service.tokenize(tokenize_request(request))
            texts = await self._service.token_texts(request.model, ids) if request.return_tokens else ()
            facts = self._service.model(request.model)
            return service_pb2.TokenizeResponse(token_ids=ids, tokens=texts, max_model_len=facts.max_context_tokens)

        return await self._answer_or_refuse(answer, service_pb2.TokenizeResponse, context)

    async def Detokenize(self, request: service_pb2.DetokenizeRequest, context: CallContext) -> service_pb2.DetokenizeResponse:
        async def answer() -> service_pb2.DetokenizeResponse:
            caller_of(context, self._authenticator, Scope.INFER)
            self._check_size(request)
            return service_pb2.DetokenizeResponse(text=await self._service.detokenize(request.model, tuple(request.token_ids)))

        return await self._answer_or_refuse(answer, service_pb2.DetokenizeResponse, context)

    async def _answer_or_refuse(
        self, answer: Callable[[], Awaitable[Response]], response: type[Response], context: CallContext, request_id: str = ""
    ) -> Response:
        return await answer_or_refuse(answer, response, context, request_id, self._on_error)

    def _chat_request(self, message: service_pb2.ChatRequest, request_id: str, context: CallContext) -> ChatRequest:
        caller, session = self._admit(message, request_id, context), self._session(context)
        request = chat_request(message, request_id=request_id, deadline_s=self._deadline_s(context), session=session)
        return dataclasses.replace(
            request, caller=caller, idempotency_key=self._key(context), trace=extract_trace(context.invocation_metadata() or ())
        )

    def _completion_request(self, message: service_pb2.GenerateRequest, request_id: str, context: CallContext) -> CompletionRequest:
        caller, session = self._admit(message, request_id, context), self._session(context)
        request = completion_request(message, request_id=request_id, deadline_s=self._deadline_s(context), session=session)
        return dataclasses.replace(
            request, caller=caller, idempotency_key=self._key(context), trace=extract_trace(context.invocation_metadata() or ())
        )

    def _embedding_request(self, message: service_pb2.EmbedRequest, request_id: str, context: CallContext) -> EmbeddingRequest:
        caller, session = self._admit(message, request_id, context), self._session(context)
        request = embedding_request(message, request_id=request_id, deadline_s=self._deadline_s(context), session=session)
        return dataclasses.replace(
            request, caller=caller, idempotency_key=self._key(context), trace=extract_trace(context.invocation_metadata() or ())
        )

    def _so_far(self, message: service_pb2.ChatStreamRequest | service_pb2.GenerateStreamRequest) -> tuple[SoFar, ...]:
        self._check_size(message)
        return parse_so_far(message.so_far)

    def _admit(self, message: Message, request_id: str, context: CallContext) -> Caller:
        """Place 2: authenticates the call and checks the size of its message."""
        caller = caller_of(context, self._authenticator, Scope.INFER)
        trace_place(2, request_id)
        self._check_size(message)
        return caller

    def _check_size(self, message: Message) -> None:
        """Checked here so that the error has a reason. Ray Serve's gRPC server has one limit, which also applies to responses."""
        limits = self._service.limits
        if message.ByteSize() > limits.body_bytes:
            raise RequestTooLarge(limit_bytes=limits.body_bytes)
        check_counts(message, limits)

    def _session(self, context: CallContext) -> str:
        return parse_session_id(_metadata_value(context, SESSION_HEADER), None, self._service.limits)

    def _key(self, context: CallContext) -> str:
        return parse_idempotency_key(_metadata_value(context, IDEMPOTENCY_KEY), self._service.limits)

    def _deadline_s(self, context: CallContext) -> float | None:
        """Unix time of the client's deadline. Ray Serve's context does not have it: there the deadline arrives as a cancellation."""
        time_remaining = getattr(context, "time_remaining", None)
        remaining_s = time_remaining() if time_remaining else None
        return None if remaining_s is None else self._clock() + remaining_s


def _metadata_value(context: CallContext, name: str) -> str | None:
    return {key: value for key, value in context.invocation_metadata() or () if key == name}.get(name)


def _new_request_id(prefix: str) -> str:
    request_id = f"{prefix}-{uuid.uuid4().hex}"
    trace_place(1, request_id)
    return request_id


async def answer_or_refuse(
    answer: Callable[[], Awaitable[Response]],
    response: type[Response],
    context: CallContext,
    request_id: str = "",
    on_error: Callable[[BaseException], None] = lambda error: None,
) -> Response:
    """The result of ``answer``. If it fails, an empty response, with the error in ``context``."""
    try:
        return await answer()
    except Exception as error:
        on_error(error)
        refuse(context, error, request_id)
        return response()


async def _stream_or_refuse(
    begin: Callable[[], tuple[AsyncGenerator[TextEvent, None], Sequence[SoFar]]],
    response: type[StreamResponse],
    context: CallContext,
    request_id: str,
    on_error: Callable[[BaseException], None],
) -> AsyncGenerator[StreamResponse, None]:
    is_first, held_s = True, 0.0
    try:
        stream, so_far = begin()
        writer = StreamWriter(so_far)
        async with aclosing(stream) as events:
            async for event in events:
                held_s = max(held_s, event.held_s)
                set_timing_trailers(context, event.timing, held_s)
                for fields in writer.events(event):
                    if is_first:
                        is_first = False
                        trace_place(14, request_id)
                    yield response(id=request_id, **fields)  # type: ignore[arg-type]
    except Exception as error:
        on_error(error)
        yield response(id=request_id, error=refuse(context, error, request_id))
