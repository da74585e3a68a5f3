"""Assembles the events of a stream into an answer, and detects incomplete ones."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from . import convert
from ._generated import messages_pb2, service_pb2
from .answers import ChatCompletion, Completion, Delta, Usage
from .errors import StreamBroken
from .rpc_errors import from_event

Answer = TypeVar("Answer", ChatCompletion, Completion)
Event = service_pb2.ChatStreamResponse | service_pb2.GenerateStreamResponse


@dataclass
class PartialChoice:
    """What has arrived of one choice."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[messages_pb2.TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[messages_pb2.TokenLogprob] = field(default_factory=list)
    tool_calls: dict[int, messages_pb2.ToolCall] = field(default_factory=dict)
    finish: messages_pb2.Finish | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Assembly(Generic[Answer]):
    """The answer so far."""

    def __init__(self, model: str, build: Callable[["Assembly[Answer]"], Answer]) -> None:
        self.id = ""
        self.model = model
        self.created = int(time.time())
        self.choices: dict[int, PartialChoice] = {}
        self.usage: Usage | None = None
        self.raw_usage: messages_pb2.Usage | None = None
        self._build: Callable[[Assembly[Answer]], Answer] = build

    def add(self, event: Event) -> Delta | None:
        """Add an event. Returns the `Delta` of a delta or finish, else None.

        Raises:
            CallFailed: it is an error event.
            StreamBroken: tokens before it are missing.
        """
        self.id = event.id
        kind = event.WhichOneof("event")
        if kind == "delta":
            return self._add_delta(event.delta)
        if kind == "finish":
            return self._add_finish(event.finish)
        if kind == "error":
            raise from_event(event.error, event.id)
        if kind == "usage":
            self.usage, self.raw_usage = convert.usage(event.usage), event.usage
        return None

    @property
    def is_whole(self) -> bool:
        return self.usage is not None and all(choice.finish is not None for choice in self.choices.values())

    def so_far(self) -> list[messages_pb2.SoFar]:
        """What a server needs to know in order to send the rest."""
        return [
            messages_pb2.SoFar(index=index, token_ids=choice.token_ids, finished=choice.finish is not None)
            for index, choice in sorted(self.choices.items())
        ]

    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            StreamBroken: it is incomplete.
        """
        if not self.is_whole:
            raise StreamBroken(f"the stream of request {self.id or '(none)'} ended before its answer did")
        return self._build(self)

    def text(self, index: int = 0) -> str:
        return self.choices[index].text if index in self.choices else ""

    def _add_delta(self, delta: messages_pb2.Delta) -> Delta:
        choice = self.choices.setdefault(delta.index, PartialChoice())
        self._expect(choice, delta.index, delta.offset)
        choice.texts.append(delta.text)
        choice.token_ids.extend(delta.token_ids)
        choice.logprobs.extend(delta.logprobs)
        choice.prompt_logprobs.extend(delta.prompt_logprobs)
        for call in delta.tool_calls:
            known = choice.tool_calls.setdefault(call.index, messages_pb2.ToolCall(id=call.id, name=call.name))
            known.arguments += call.arguments
        return convert.delta(delta)

    def _add_finish(self, finish: messages_pb2.Finish) -> Delta:
        choice = self.choices.setdefault(finish.index, PartialChoice())
        self._expect(choice, finish.index, finish.completion_tokens)
        choice.finish = finish
        return convert.finish(finish)

    def _expect(self, choice: PartialChoice, index: int, offset: int) -> None:
        if choice.finish is not None or offset != len(choice.token_ids):
            raise StreamBroken(
                f"choice {index} of request {self.id} is at token {len(choice.token_ids)}"
                f"{' and finished' if choice.finish else ''}, and the next event is for token {offset}"
            )


def build_chat(assembly: Assembly[ChatCompletion]) -> ChatCompletion:
    """The answer of a chat, as the unary call `Chat` would return it."""
    choices = [
        messages_pb2.ChatChoice(
            message=messages_pb2.Message(
                role=messages_pb2.ROLE_ASSISTANT,
                content=choice.text,
                tool_calls=[call for _, call in sorted(choice.tool_calls.items())],
            ),
            **_shared(index, choice),  # type: ignore[arg-type]
        )
        for index, choice in sorted(assembly.choices.items())
    ]
    return convert.chat_completion(
        service_pb2.ChatResponse(id=assembly.id, created=assembly.created, model=assembly.model, choices=choices, usage=assembly.raw_usage)
    )


def build_completion(assembly: Assembly[Completion]) -> Completion:
    """The answer of a completion, as the unary call `Generate` would return it."""
    choices = [
        messages_pb2.GenerateChoice(text=choice.text, prompt_logprobs=choice.prompt_logprobs, **_shared(index, choice))  # type: ignore[arg-type]
        for index, choice in sorted(assembly.choices.items())
    ]
    return convert.completion(
        service_pb2.GenerateResponse(
            id=assembly.id, created=assembly.created, model=assembly.model, choices=choices, usage=assembly.raw_usage
        )
    )


def _shared(index: int, choice: PartialChoice) -> dict[str, object]:
    assert choice.finish is not None
    return {
        "index": index,
        "finish_reason": choice.finish.finish_reason,
        "stop_reason": choice.finish.stop_reason,
        "token_ids": choice.token_ids,
        "logprobs": choice.logprobs,
    }
