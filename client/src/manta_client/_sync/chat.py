# Generated from `_async/chat.py` by client/unasync.py. Do not edit.
"""`client.chat`: chat completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import convert
from .._generated import service_pb2
from ..answers import ChatCompletion
from ..assembly import Assembly, build_chat
from ..requests import ChatMessage, Options, chat_request, key_of, seeded
from .models import Models
from .stream import Stream
from .transport import StreamingCall, Transport

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Chat:
    def __init__(self, transport: Transport, models: Models) -> None:
        self._transport, self._models = transport, models

    def create(
        self,
        *,
        messages: Sequence[ChatMessage],
        model: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        tools: Sequence[Any] = (),
        tool_choice: Any = None,
        parallel_tool_calls: bool | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[Options],
    ) -> ChatCompletion:
        """Answer a conversation.

        Args:
            messages: oldest first, each {"role": "system" | "user" | "assistant" | "tool", "content": ...}.
            model: a name from `models.list`; may be left out if the server has only one.
            priority: from -1000 to 1000; lower numbers are served first.
            timeout: seconds in all, including retries; default: the client's.
            tools: functions that the model may call: pydantic models, or OpenAI's dicts.
            tool_choice: "auto", "none", "required", or {"type": "function", "function": {"name": ...}}.
            parallel_tool_calls: whether an answer may contain several calls; default: yes.
            idempotency_key: requests with the same key are computed once; default: a new one.
            options: temperature, max_tokens, stop, seed, response_format, ...; see `Options`.

        Raises:
            CallFailed: the server refused the call or failed, or the timeout passed.
            ModelNotChosen: no model was named, and the server has several.
        """
        calls: dict[str, Any] = {"tools": tools, "tool_choice": tool_choice, "parallel_tool_calls": parallel_tool_calls}
        name, key = model or self._models.only(timeout=timeout), key_of(idempotency_key)
        request = chat_request(model=name, messages=messages, priority=priority, options=seeded(options, key), **calls)
        response = self._transport.call("Chat", request, service_pb2.ChatResponse, timeout_s=timeout, key=key)
        return convert.chat_completion(response)

    def stream(
        self,
        *,
        messages: Sequence[ChatMessage],
        model: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        tools: Sequence[Any] = (),
        tool_choice: Any = None,
        parallel_tool_calls: bool | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[Options],
    ) -> Stream[ChatCompletion]:
        """Answer a conversation as a stream of `Delta`s. The same arguments and errors as `create`."""

        calls: dict[str, Any] = {"tools": tools, "tool_choice": tool_choice, "parallel_tool_calls": parallel_tool_calls}

        key = key_of(idempotency_key)

        def begin() -> tuple[StreamingCall, Assembly[ChatCompletion]]:
            name = model or self._models.only(timeout=timeout)
            request = chat_request(model=name, messages=messages, priority=priority, options=seeded(options, key), **calls)
            stream_request = service_pb2.ChatStreamRequest(request=request)
            call = StreamingCall(self._transport, "ChatStream", stream_request, timeout_s=timeout, key=key)
            return call, Assembly(name, build_chat)

        return Stream(begin)
