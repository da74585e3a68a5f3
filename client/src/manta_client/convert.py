"""Converts protobuf responses to this library's dataclasses."""

from collections.abc import Iterable

from ._generated import messages_pb2, service_pb2
from .answers import (
    ChatCompletion,
    Choice,
    Completion,
    Delta,
    Embedding,
    EmbeddingList,
    Model,
    Tokenization,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    TopLogprob,
    Usage,
)


def chat_completion(response: service_pb2.ChatResponse) -> ChatCompletion:
    choices = tuple(_choice(choice, choice.message.content, choice.message.tool_calls) for choice in response.choices)
    return ChatCompletion(id=response.id, model=response.model, choices=choices, usage=usage(response.usage), raw=response)


def completion(response: service_pb2.GenerateResponse) -> Completion:
    choices = tuple(_choice(choice, choice.text) for choice in response.choices)
    return Completion(id=response.id, model=response.model, choices=choices, usage=usage(response.usage), raw=response)


def delta(message: messages_pb2.Delta) -> Delta:
    return Delta(
        index=message.index,
        text=message.text,
        offset=message.offset,
        token_ids=tuple(message.token_ids),
        logprobs=_logprobs(message.logprobs),
        tool_calls=tuple(
            ToolCallDelta(index=call.index, id=call.id or None, name=call.name or None, arguments=call.arguments)
            for call in message.tool_calls
        ),
        prompt_logprobs=_logprobs(message.prompt_logprobs),
        raw=message,
    )


def finish(message: messages_pb2.Finish) -> Delta:
    return Delta(
        index=message.index,
        offset=message.completion_tokens,
        finish_reason=_finish_reason(message.finish_reason),
        stop_reason=_stop_reason(message.stop_reason),
        raw=message,
    )


def usage(message: messages_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        total_tokens=message.total_tokens,
        cached_tokens=message.cached_tokens,
    )


def tokenization(response: service_pb2.TokenizeResponse) -> Tokenization:
    return Tokenization(
        token_ids=tuple(response.token_ids), tokens=tuple(response.tokens), max_model_len=response.max_model_len, raw=response
    )


def embeddings(response: service_pb2.EmbedResponse) -> EmbeddingList:
    data = tuple(Embedding(index=one.index, vector=tuple(one.values)) for one in response.embeddings)
    return EmbeddingList(id=response.id, model=response.model, data=data, usage=usage(response.usage), raw=response)


def model(message: messages_pb2.Model) -> Model:
    return Model(
        id=message.id,
        created=message.created,
        owned_by=message.owned_by,
        max_model_len=message.max_model_len,
        root=message.root,
        parent=message.parent or None,
        raw=message,
    )


def _choice(
    choice: messages_pb2.ChatChoice | messages_pb2.GenerateChoice, text: str, calls: Iterable[messages_pb2.ToolCall] = ()
) -> Choice:
    return Choice(
        index=choice.index,
        text=text,
        finish_reason=_finish_reason(choice.finish_reason),
        stop_reason=_stop_reason(choice.stop_reason),
        token_ids=tuple(choice.token_ids),
        logprobs=_logprobs(choice.logprobs),
        tool_calls=tuple(ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in calls),
        prompt_logprobs=_logprobs(choice.prompt_logprobs) if isinstance(choice, messages_pb2.GenerateChoice) else (),
    )


def _logprobs(messages: Iterable[messages_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            token_id=message.token_id,
            token=message.token,
            bytes=message.bytes,
            logprob=message.logprob,
            top_logprobs=tuple(
                TopLogprob(token_id=top.token_id, token=top.token, bytes=top.bytes, logprob=top.logprob) for top in message.top_logprobs
            ),
        )
        for message in messages
    )


def _finish_reason(value: int) -> str:
    """FINISH_REASON_STOP becomes "stop". A reason newer than this library becomes its number."""
    known = messages_pb2.FinishReason.DESCRIPTOR.values_by_number.get(value)
    return known.name.removeprefix("FINISH_REASON_").lower() if known else str(value)


def _stop_reason(message: messages_pb2.StopReason) -> str | int | None:
    kind = message.WhichOneof("reason")
    return getattr(message, kind) if kind else None
