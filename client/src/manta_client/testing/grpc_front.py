"""The fake server over gRPC: both services of manta.v1, with scripted answers."""

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, json_format
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from .._generated import admin_pb2, admin_pb2_grpc, messages_pb2, service_pb2, service_pb2_grpc
from ..rpc_errors import DETAILS_KEY
from .script import WORD, Answer, Failure, Received, Script, ending_of, pieces_of, vectors_of

REFUSED = Failure("UNAUTHENTICATED", "this fake needs its API key", reason="invalid_api_key")
DRAINING = Failure("UNAVAILABLE", "this fake is drained", reason="draining", retry_after_s=0.05)


class Gate:
    """Checks API keys, and remembers whether the server is draining."""

    def __init__(self, api_key: str | None) -> None:
        self.api_key = api_key
        self.draining = False

    def refusal(self, headers: Mapping[str, str]) -> Failure | None:
        if self.api_key is not None and headers.get("authorization") != f"Bearer {self.api_key}":
            return REFUSED
        return None


class FakeManta(service_pb2_grpc.MantaServiceServicer):
    def __init__(self, script: Script, models: Mapping[str, int], gate: Gate) -> None:
        """``models``: names and context lengths."""
        self._script, self._models, self._gate = script, models, gate

    def Chat(self, request: service_pb2.ChatRequest, context: grpc.ServicerContext) -> service_pb2.ChatResponse:  # noqa: N802
        received = _chat(request, context, streamed=False)
        answer = self._whole(received, context)
        choices = [
            messages_pb2.ChatChoice(message=_message(answer, _limit(received)), **self._end(answer, received, index))
            for index in range(received.num_choices)
        ]
        return service_pb2.ChatResponse(id="fake", model=request.model, choices=choices, usage=self._usage(received, answer))

    def Generate(self, request: service_pb2.GenerateRequest, context: grpc.ServicerContext) -> service_pb2.GenerateResponse:  # noqa: N802
        received = _completion(request, context, streamed=False)
        answer = self._whole(received, context)
        text = "".join(pieces_of(answer, _limit(received)))
        choices = [messages_pb2.GenerateChoice(text=text, **self._end(answer, received, index)) for index in range(received.num_choices)]
        return service_pb2.GenerateResponse(id="fake", model=request.model, choices=choices, usage=self._usage(received, answer))

    def ChatStream(  # noqa: N802
        self, request: service_pb2.ChatStreamRequest, context: grpc.ServicerContext
    ) -> Iterator[service_pb2.ChatStreamResponse]:
        received = _chat(request.request, context, streamed=True, so_far=request.so_far)
        for event in self._events(received, context):
            yield service_pb2.ChatStreamResponse(id="fake", **event)

    def GenerateStream(  # noqa: N802
        self, request: service_pb2.GenerateStreamRequest, context: grpc.ServicerContext
    ) -> Iterator[service_pb2.GenerateStreamResponse]:
        received = _completion(request.request, context, streamed=True, so_far=request.so_far)
        for event in self._events(received, context):
            yield service_pb2.GenerateStreamResponse(id="fake", **event)

    def Embed(self, request: service_pb2.EmbedRequest, context: grpc.ServicerContext) -> service_pb2.EmbedResponse:  # noqa: N802
        received = _embedding(request, context)
        vectors = vectors_of(self._whole(received, context), received)
        embeddings = [messages_pb2.Embedding(index=index, values=vector) for index, vector in enumerate(vectors)]
        asked = self._script.prompt_tokens(received)
        usage = messages_pb2.Usage(prompt_tokens=asked, total_tokens=asked)
        return service_pb2.EmbedResponse(id="fake", model=request.model, embeddings=embeddings, usage=usage)

    def ListModels(self, request: service_pb2.ListModelsRequest, context: grpc.ServicerContext) -> service_pb2.ListModelsResponse:  # noqa: N802
        self._let_in(context)
        return service_pb2.ListModelsResponse(models=[_model(name, size) for name, size in self._models.items()])

    def GetModel(self, request: service_pb2.GetModelRequest, context: grpc.ServicerContext) -> service_pb2.GetModelResponse:  # noqa: N802
        self._let_in(context)
        self._know(request.model, context)
        return service_pb2.GetModelResponse(model=_model(request.model, self._models[request.model]))

    def Tokenize(self, request: service_pb2.TokenizeRequest, context: grpc.ServicerContext) -> service_pb2.TokenizeResponse:  # noqa: N802
        self._let_in(context)
        self._know(request.model, context)
        said = [request.text] if request.WhichOneof("input") == "text" else [one.content for one in request.conversation.messages]
        words = [word for text in said for word in WORD.findall(text)]
        tokens = words if request.return_tokens else []
        return service_pb2.TokenizeResponse(
            token_ids=self._script.token_ids(words), tokens=tokens, max_model_len=self._models[request.model]
        )

    def Detokenize(self, request: service_pb2.DetokenizeRequest, context: grpc.ServicerContext) -> service_pb2.DetokenizeResponse:  # noqa: N802
        self._let_in(context)
        try:
            return service_pb2.DetokenizeResponse(text=self._script.text_of(request.token_ids))
        except KeyError:
            refuse(context, Failure("INVALID_ARGUMENT", "no such token", reason="invalid_value", param="tokens"))

    def _let_in(self, context: grpc.ServicerContext) -> None:
        if refusal := self._gate.refusal(_headers(context)):
            refuse(context, refusal)

    def _know(self, model: str, context: grpc.ServicerContext) -> None:
        if model not in self._models:
            refuse(context, Failure("NOT_FOUND", "there is no such model", reason="model_not_found", param="model"))

    def _next(self, received: Received, context: grpc.ServicerContext) -> Answer | Failure:
        self._let_in(context)
        if self._gate.draining:
            refuse(context, DRAINING)
        self._know(received.model, context)
        return self._script.next(received)

    def _whole(self, received: Received, context: grpc.ServicerContext) -> Answer:
        answer = self._next(received, context)
        if isinstance(answer, Failure):
            refuse(context, answer)
        time.sleep(answer.pause_s)
        if answer.breaks_after is not None and self._script.breaks_now(received, answer, answer.breaks_after):
            context.abort(grpc.StatusCode.UNAVAILABLE, "the connection was lost, by script")
        return answer

    def _events(self, received: Received, context: grpc.ServicerContext) -> Iterator[dict[str, Any]]:
        said = self._next(received, context)
        answer = self._script.default if isinstance(said, Failure) else said
        words = list(pieces_of(answer, _limit(received)))
        for place, word in enumerate(words):
            if isinstance(said, Failure) and place == said.after:
                refuse(context, said)
            time.sleep(answer.pause_s)
            if self._script.breaks_now(received, answer, place):
                context.abort(grpc.StatusCode.UNAVAILABLE, "the connection was lost, by script")
            (token_id,) = self._script.token_ids([word])
            for index in _open(received, place):
                yield {"delta": messages_pb2.Delta(index=index, text=word, offset=place, token_ids=[token_id])}
        if isinstance(said, Failure):
            refuse(context, said)
        for index in _open(received, len(words)):
            yield from self._last(answer, received, index, len(words))
        yield {"usage": self._usage(received, answer)}

    def _last(self, answer: Answer, received: Received, index: int, num_tokens: int) -> Iterator[dict[str, Any]]:
        if answer.tool_calls:
            calls = [
                messages_pb2.ToolCallDelta(index=place, id=call.id, name=call.name, arguments=call.arguments)
                for place, call in enumerate(answer.tool_calls)
            ]
            yield {"delta": messages_pb2.Delta(index=index, offset=num_tokens, tool_calls=calls)}
        reason = _reason(answer, _limit(received))
        yield {"finish": messages_pb2.Finish(index=index, finish_reason=reason, completion_tokens=num_tokens)}

    def _end(self, answer: Answer, received: Received, index: int) -> dict[str, Any]:
        limit = _limit(received)
        ids = self._script.token_ids(list(pieces_of(answer, limit)))
        return {"index": index, "finish_reason": _reason(answer, limit), "token_ids": ids}

    def _usage(self, received: Received, answer: Answer) -> messages_pb2.Usage:
        asked = self._script.prompt_tokens(received)
        told = len(list(pieces_of(answer, _limit(received)))) * received.num_choices
        return messages_pb2.Usage(prompt_tokens=asked, completion_tokens=told, total_tokens=asked + told)


class FakeAdmin(admin_pb2_grpc.AdminServiceServicer):
    def __init__(self, script: Script, models: Mapping[str, int], gate: Gate) -> None:
        self._script, self._models, self._gate = script, models, gate

    def GetServerInfo(  # noqa: N802
        self, request: admin_pb2.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> admin_pb2.GetServerInfoResponse:
        self._let_in(context)
        models = [_model(name, size) for name, size in self._models.items()]
        return admin_pb2.GetServerInfoResponse(version="fake", models=models, draining=self._gate.draining)

    def GetLoad(self, request: admin_pb2.GetLoadRequest, context: grpc.ServicerContext) -> admin_pb2.GetLoadResponse:  # noqa: N802
        self._let_in(context)
        return admin_pb2.GetLoadResponse(draining=self._gate.draining)

    def Abort(self, request: admin_pb2.AbortRequest, context: grpc.ServicerContext) -> admin_pb2.AbortResponse:  # noqa: N802
        self._let_in(context)
        return admin_pb2.AbortResponse(choices=0)

    def Drain(self, request: admin_pb2.DrainRequest, context: grpc.ServicerContext) -> admin_pb2.DrainResponse:  # noqa: N802
        self._let_in(context)
        self._gate.draining = not request.undo
        return admin_pb2.DrainResponse(open_requests=0)

    def _let_in(self, context: grpc.ServicerContext) -> None:
        if refusal := self._gate.refusal(_headers(context)):
            refuse(context, refusal)


def refuse(context: grpc.ServicerContext, failure: Failure) -> NoReturn:
    """End the call as Manta's server does, with a code and google.rpc details."""
    code = grpc.StatusCode[failure.code]
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=failure.reason.upper(), domain="manta")]
    details.append(error_details_pb2.RequestInfo(request_id="fake"))
    if failure.param is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=failure.param, description=failure.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if failure.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(failure.retry_after_s * 1e9))
        details.append(retry)
    status = status_pb2.Status(code=code.value[0], message=failure.message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    context.set_trailing_metadata(((DETAILS_KEY, status.SerializeToString()),))
    context.abort(code, failure.message)
    raise AssertionError  # abort raises


def _chat(request: service_pb2.ChatRequest, context: grpc.ServicerContext, *, streamed: bool, so_far: Any = ()) -> Received:
    return Received(
        kind="chat",
        messages=[_spoken(message) for message in request.messages],
        tools=[tool.name for tool in request.tools],
        **_common(request, context, streamed, so_far),
    )


def _completion(request: service_pb2.GenerateRequest, context: grpc.ServicerContext, *, streamed: bool, so_far: Any = ()) -> Received:
    return Received(kind="completion", prompts=_prompts(request.prompts), **_common(request, context, streamed, so_far))


def _embedding(request: service_pb2.EmbedRequest, context: grpc.ServicerContext) -> Received:
    options = {"dimensions": request.dimensions} if request.HasField("dimensions") else {}
    said: dict[str, Any] = {"protocol": "grpc", "streamed": False, "model": request.model, "headers": _headers(context)}
    return Received(kind="embedding", prompts=_prompts(request.inputs), options=options, **said)


def _prompts(prompts: Iterable[messages_pb2.Prompt]) -> list[str | tuple[int, ...]]:
    return [one.text if one.WhichOneof("content") == "text" else tuple(one.token_ids.ids) for one in prompts]


def _common(request: Any, context: grpc.ServicerContext, streamed: bool, so_far: Any) -> dict[str, Any]:
    return {
        "protocol": "grpc",
        "streamed": streamed,
        "model": request.model,
        "options": json_format.MessageToDict(request.options, preserving_proto_field_name=True),
        "headers": _headers(context),
        "had": {one.index: len(one.token_ids) for one in so_far},
        "finished": frozenset(one.index for one in so_far if one.finished),
    }


def _headers(context: grpc.ServicerContext) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}


def _spoken(message: messages_pb2.Message) -> dict[str, Any]:
    return {"role": messages_pb2.Role.Name(message.role).removeprefix("ROLE_").lower(), "content": message.content}


def _open(received: Received, place: int) -> Iterator[int]:
    """The choices of which the client still lacks the piece at ``place``."""
    for index in range(received.num_choices):
        if index not in received.finished and received.had.get(index, 0) <= place:
            yield index


def _limit(received: Received) -> int | None:
    limit = received.options.get("max_tokens")
    return None if limit is None else int(limit)


def _reason(answer: Answer, limit: int | None) -> str:
    return f"FINISH_REASON_{ending_of(answer, limit).upper()}"


def _message(answer: Answer, limit: int | None) -> messages_pb2.Message:
    calls = [messages_pb2.ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in answer.tool_calls]
    return messages_pb2.Message(role="ROLE_ASSISTANT", content="".join(pieces_of(answer, limit)), tool_calls=calls)


def _model(name: str, max_model_len: int) -> messages_pb2.Model:
    return messages_pb2.Model(id=name, owned_by="fake", max_model_len=max_model_len, root=name)
