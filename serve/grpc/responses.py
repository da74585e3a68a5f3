"""Place 14 of a request over gRPC: the service's results and events become protobuf messages."""

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from serve.grpc.generated import messages_pb2, service_pb2
from serve.model_facts import ModelFacts
from serve.request import ChoiceResult, EmbeddingResult, Result, SoFar, TextEvent, TextToken, Usage

FINISH_REASONS = {
    "stop": messages_pb2.FINISH_REASON_STOP,
    "length": messages_pb2.FINISH_REASON_LENGTH,
    "tool_calls": messages_pb2.FINISH_REASON_TOOL_CALLS,
}
OWNER = "manta"


def chat_response(result: Result, *, model: str, created: int) -> service_pb2.ChatResponse:
    choices = [
        messages_pb2.ChatChoice(
            index=choice.choice,
            message=messages_pb2.Message(
                role=messages_pb2.ROLE_ASSISTANT,
                content=choice.text,
                tool_calls=[messages_pb2.ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in choice.tool_calls],
            ),
            finish_reason=FINISH_REASONS[choice.finish_reason],
            stop_reason=_stop_reason(choice.stop_reason),
            token_ids=_ids(choice.tokens),
            logprobs=_logprobs(choice.tokens),
        )
        for choice in result.choices
    ]
    return service_pb2.ChatResponse(id=result.request_id, created=created, model=model, choices=choices, usage=_usage(result.usage))


def generate_response(result: Result, *, model: str, created: int) -> service_pb2.GenerateResponse:
    choices = [_generate_choice(choice) for choice in result.choices]
    return service_pb2.GenerateResponse(id=result.request_id, created=created, model=model, choices=choices, usage=_usage(result.usage))


def embed_response(result: EmbeddingResult, *, model: str, created: int) -> service_pb2.EmbedResponse:
    embeddings = [
        messages_pb2.Embedding(index=index, values=np.frombuffer(vector, "<f4").tolist()) for index, vector in enumerate(result.vectors)
    ]
    return service_pb2.EmbedResponse(id=result.request_id, created=created, model=model, embeddings=embeddings, usage=_usage(result.usage))


def model_message(facts: ModelFacts) -> messages_pb2.Model:
    return messages_pb2.Model(
        id=facts.name,
        created=facts.created,
        owned_by=OWNER,
        max_model_len=facts.max_context_tokens,
        root=facts.root,
        parent=facts.parent or "",
    )


class StreamWriter:
    """Converts the events of one request. Counts the tokens of each choice: a delta has their offset, a finish their total."""

    def __init__(self, so_far: Iterable[SoFar] = ()) -> None:
        """``so_far``: what the client already has."""
        self._num_tokens: Counter[int] = Counter({received.choice: len(received.tokens) for received in so_far})

    def events(self, event: TextEvent) -> Iterator[dict[str, object]]:
        """The response's `event` fields in order, each by name: delta, finish and usage, whichever there are."""
        if event.text or event.tokens or event.tool_calls or event.prompt_tokens:
            yield {"delta": self._delta(event)}
        if event.finish_reason is not None:
            yield {"finish": self._finish(event)}
        if event.usage is not None:
            yield {"usage": _usage(event.usage)}

    def _delta(self, event: TextEvent) -> messages_pb2.Delta:
        offset = self._num_tokens[event.choice]
        self._num_tokens[event.choice] += len(event.tokens)
        return messages_pb2.Delta(
            index=event.choice,
            text=event.text,
            offset=offset,
            token_ids=_ids(event.tokens),
            logprobs=_logprobs(event.tokens),
            prompt_logprobs=_logprobs(event.prompt_tokens),
            tool_calls=[
                messages_pb2.ToolCallDelta(index=call.index, id=call.id or "", name=call.name or "", arguments=call.arguments)
                for call in event.tool_calls
            ],
        )

    def _finish(self, event: TextEvent) -> messages_pb2.Finish:
        assert event.finish_reason is not None
        return messages_pb2.Finish(
            index=event.choice,
            finish_reason=FINISH_REASONS[event.finish_reason],
            stop_reason=_stop_reason(event.stop_reason),
            completion_tokens=self._num_tokens[event.choice],
        )


def _generate_choice(choice: ChoiceResult) -> messages_pb2.GenerateChoice:
    return messages_pb2.GenerateChoice(
        index=choice.choice,
        text=choice.text,
        finish_reason=FINISH_REASONS[choice.finish_reason],
        stop_reason=_stop_reason(choice.stop_reason),
        token_ids=_ids(choice.tokens),
        logprobs=_logprobs(choice.tokens),
        prompt_logprobs=_logprobs(choice.prompt_tokens),
    )


def _ids(tokens: Iterable[TextToken]) -> list[int]:
    return [token.id for token in tokens]


def _logprobs(tokens: Iterable[TextToken]) -> list[messages_pb2.TokenLogprob]:
    """For the tokens that have log-probabilities."""
    return [
        messages_pb2.TokenLogprob(
            token_id=token.id,
            token=token.text,
            bytes=token.raw,
            logprob=token.logprobs.logprob,
            top_logprobs=[
                messages_pb2.TopLogprob(token_id=token_id, token=text, bytes=raw, logprob=logprob)
                for token_id, text, raw, logprob in token.top
            ],
        )
        for token in tokens
        if token.logprobs is not None
    ]


def _stop_reason(reason: str | int | None) -> messages_pb2.StopReason | None:
    if reason is None:
        return None
    return messages_pb2.StopReason(stop=reason) if isinstance(reason, str) else messages_pb2.StopReason(stop_token_id=reason)


def _usage(usage: Usage) -> messages_pb2.Usage:
    return messages_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        cached_tokens=usage.cached_tokens,
    )
