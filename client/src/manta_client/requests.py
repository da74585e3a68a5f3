"""Converts keyword arguments to protobuf requests."""

from __future__ import annotations

import difflib
import hashlib
import reprlib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType
from typing import Any, TypedDict

from ._generated import messages_pb2, service_pb2
from .endpoint import is_header_value
from .formats import call_message, response_format, tool_choice_message, tool_message

Prompt = str | Sequence[int]
"""Text, or token ids."""
ChatMessage = Mapping[str, Any]
"""{"role": "user", "content": "..."} as in OpenAI's clients; also assistant messages with tool_calls, and results of tools."""


class Options(TypedDict, total=False):
    """Sampling and stop options. Each may be left out; None means the same."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    n: int | None
    max_tokens: int | None
    min_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    logprobs: int | None
    response_format: Any
    """A pydantic model, a JSON schema, or {"type": "json_object" | "json_schema" | "regex" | "choice" | "grammar", ...}."""


ROLES = tuple(name for name in messages_pb2.Role.keys() if name != "ROLE_UNSPECIFIED")  # noqa: SIM118 (an enum wrapper, no dict)
KNOWN = frozenset(Options.__annotations__)


def options_message(options: Options) -> messages_pb2.Options:
    """Options as protobuf.

    Raises:
        TypeError: an option is unknown or has the wrong type.
        ValueError: a number does not fit its field.
    """
    for name in options.keys() - KNOWN:
        near = difflib.get_close_matches(name, KNOWN, n=1)
        raise TypeError(f"there is no option {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    if "response_format" in given:
        given["response_format"] = response_format(given["response_format"])
    try:
        return messages_pb2.Options(**given)
    except (TypeError, ValueError):  # protobuf's messages do not name the field
        for name, value in given.items():
            _check_option(name, value)
        raise


def _check_option(name: str, value: Any) -> None:
    try:
        messages_pb2.Options(**{name: value})
    except TypeError:
        annotation = Options.__annotations__[name]
        kind = str(getattr(annotation, "__forward_arg__", annotation)).removesuffix(" | None")
        raise TypeError(f"{name} must be {kind}, not {reprlib.repr(value)}") from None
    except ValueError:
        raise ValueError(f"{name} is out of range: {reprlib.repr(value)}") from None


def seeded(options: Options, key: str) -> Options:
    """The options with a seed; by default derived from the idempotency key, so that a repeated request has the same answer anywhere."""
    if options.get("seed") is not None:
        return options
    seeded_options = options.copy()
    seeded_options["seed"] = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    return seeded_options


def key_of(given: str | None) -> str:
    """The idempotency key of a call: the given one, or a new one.

    Raises:
        ValueError: HTTP/2 cannot send the given one.
    """
    if not given:
        return uuid.uuid4().hex
    if not is_header_value(given):
        raise ValueError(f"idempotency_key must be text in printable ASCII, not {reprlib.repr(given)}")
    return given


def chat_request(
    *,
    model: str,
    messages: Sequence[ChatMessage],
    priority: int,
    options: Options,
    tools: Sequence[Any] = (),
    tool_choice: Any = None,
    parallel_tool_calls: bool | None = None,
) -> service_pb2.ChatRequest:
    return service_pb2.ChatRequest(
        model=model,
        messages=_messages(messages),
        priority=priority,
        options=options_message(options),
        tools=[tool_message(tool) for tool in tools],
        tool_choice=tool_choice_message(tool_choice),
        parallel_tool_calls=parallel_tool_calls,  # type: ignore[arg-type]  # None: not set
    )


def generate_request(
    *, model: str, prompt: Prompt | Sequence[Prompt], echo: bool, priority: int, options: Options
) -> service_pb2.GenerateRequest:
    return service_pb2.GenerateRequest(
        model=model,
        prompts=_prompts("prompt", prompt),
        echo=echo,
        priority=priority,
        options=options_message(options),
    )


def tokenize_request(
    *, model: str, input: str | Sequence[ChatMessage], add_special_tokens: bool | None, return_tokens: bool
) -> service_pb2.TokenizeRequest:
    conversation = messages_pb2.Conversation(messages=[] if isinstance(input, str) else _messages(input))
    return service_pb2.TokenizeRequest(
        model=model,
        add_special_tokens=add_special_tokens,  # type: ignore[arg-type]  # None: not set
        return_tokens=return_tokens,
        **{"text": input} if isinstance(input, str) else {"conversation": conversation},
    )


def embed_request(*, model: str, input: Prompt | Sequence[Prompt], dimensions: int | None, priority: int) -> service_pb2.EmbedRequest:
    return service_pb2.EmbedRequest(
        model=model,
        inputs=_prompts("input", input),
        dimensions=dimensions,
        priority=priority,
    )


def _messages(messages: Sequence[ChatMessage]) -> list[messages_pb2.Message]:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Iterable):
        raise TypeError(f'messages must be a list like [{{"role": "user", "content": "..."}}], not {reprlib.repr(messages)}')
    return [_message(message) for message in messages]


def _message(message: ChatMessage) -> messages_pb2.Message:
    if not isinstance(message, Mapping):
        raise TypeError(f'a message must be a dict like {{"role": "user", "content": "..."}}, not {reprlib.repr(message)}')
    unknown = message.keys() - {"role", "content", "name", "tool_calls", "tool_call_id"}
    if unknown:
        raise TypeError(f"a message has role, content, name, tool_calls and tool_call_id, not {sorted(unknown)}")
    role, content = message.get("role"), message.get("content")
    name = f"ROLE_{role.upper()}" if isinstance(role, str) else ""
    if name not in ROLES:
        known = ", ".join(role.removeprefix("ROLE_").lower() for role in ROLES)
        raise ValueError(f"role {role!r} is unknown; use one of {known}")
    if content is None and role != "assistant":  # an assistant's message may have tool_calls instead
        raise TypeError(f"a message of role {role!r} needs content")
    if not isinstance(content, (str, NoneType)):
        raise TypeError(f"content must be a text, not {reprlib.repr(content)}")
    return messages_pb2.Message(
        role=name,
        content=content or "",
        name=message.get("name"),
        tool_calls=[call_message(call) for call in message.get("tool_calls") or ()],
        tool_call_id=message.get("tool_call_id"),
    )


def _prompts(name: str, prompt: Prompt | Sequence[Prompt]) -> list[messages_pb2.Prompt]:
    """A text or a list of ids is one prompt; anything else is a list of prompts."""
    if isinstance(prompt, str) or (isinstance(prompt, Sequence) and prompt and all(isinstance(token, int) for token in prompt)):
        return [_prompt(name, prompt)]  # type: ignore[arg-type]
    if isinstance(prompt, Mapping) or not isinstance(prompt, Iterable):
        raise TypeError(f"{name} must be a text, a list of token ids, or a list of these, not {reprlib.repr(prompt)}")
    return [_prompt(name, one) for one in prompt]  # type: ignore[arg-type]


def _prompt(name: str, prompt: Prompt) -> messages_pb2.Prompt:
    if isinstance(prompt, str):
        return messages_pb2.Prompt(text=prompt)
    try:
        return messages_pb2.Prompt(token_ids=messages_pb2.TokenIds(ids=prompt))
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a text or a list of token ids, not {reprlib.repr(prompt)}") from None
