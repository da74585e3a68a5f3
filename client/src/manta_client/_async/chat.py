"""`client.chat`: chat completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import convert
from .._generated import service_pb2
from ..answers import ChatCompletion
from ..assembly import Assembly, build_chat
from ..requests import ChatMessage, Options, chat_request, key_of, seeded
from .models import AsyncModels
from .stream import AsyncStream
from .transport import AsyncStreamingCall, AsyncTransport

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AsyncChat:
    def __init__(self, transport: AsyncTransport, models: AsyncModels) -> None:
        self._transport, self._models = transport, models

    async def create(
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
        name, key = model or await self._models.only(timeout=timeout), key_of(idempotency_key)
        request = chat_request(model=name, messages=messages, priority=priority, options=seeded(options, key), **calls)
        response = await self._transport.call("Chat", request, service_pb2.ChatResponse, timeout_s=timeout, key=key)
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
    ) -> AsyncStream[ChatCompletion]:
        """Answer a conversation as a stream of `Delta`s. The same arguments and errors as `create`."""

        calls: dict[str, Any] = {"tools": tools, "tool_choice": tool_choice, "parallel_tool_calls": parallel_tool_calls}

        key = key_of(idempotency_key)

        async def begin() -> tuple[AsyncStreamingCall, Assembly[ChatCompletion]]:
            name = model or await self._models.only(timeout=timeout)
            request = chat_request(model=name, messages=messages, priority=priority, options=seeded(options, key), **calls)
            stream_request = service_pb2.ChatStreamRequest(request=request)
            call = AsyncStreamingCall(self._transport, "ChatStream", stream_request, timeout_s=timeout, key=key)
            return call, Assembly(name, build_chat)

        return AsyncStream(begin)
