"""Place 1 of a request over gRPC: protobuf messages become the requests of `serve.request`. The service validates their values."""

from collections.abc import Iterable

from google.protobuf.message import Message as AnyMessage

from engine.counted import counted
from serve.errors import InvalidRequest
from serve.grpc.generated import messages_pb2, service_pb2
from serve.limits import Limits
from serve.request import (
    NO_PARAMETERS,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Message,
    Options,
    ResponseFormat,
    SoFar,
    TokenizeRequest,
    Tool,
    ToolCall,
)

NESTED = frozenset({"request", "options", "response_format", "choices", "conversation"})
"""Fields whose messages contain lists or maps with limits."""
OPENAI_NAMES = {"prompts": "prompt", "inputs": "input", "texts": "response_format", "token_ids": "tokens"}
"""OpenAI's names of fields, where they differ."""
OPTIONAL = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "n",
    "max_tokens",
    "min_tokens",
    "logprobs",
)
"""Scalar options, which are None if the client did not set them."""


def check_counts(message: AnyMessage, limits: Limits) -> None:
    """Checks `Limits.entries`.

    Raises:
        InvalidRequest: a list or map has too many entries.
    """
    entries = limits.entries
    for field, value in message.ListFields():
        if field.name in entries:
            param, limit = OPENAI_NAMES.get(field.name, field.name), entries[field.name]
            if len(value) > limit:
                raise InvalidRequest(f"{param} has {len(value)} entries, and may have at most {limit}", param=param)
            for number, one in enumerate(value if field.name == "messages" else ()):
                if len(one.tool_calls) > limits.tool_calls:
                    raise InvalidRequest(
                        f"at most {counted(limits.tool_calls, 'call')} may be given", param=f"messages[{number}].tool_calls"
                    )
        elif field.name in NESTED:
            check_counts(value, limits)


def chat_request(message: service_pb2.ChatRequest, *, request_id: str, deadline_s: float | None, session: str = "") -> ChatRequest:
    return ChatRequest(
        request_id=request_id,
        model=message.model,
        messages=tuple(_message(one) for one in message.messages),
        options=parse_options(message.options),
        tools=tuple(_tool(one) for one in message.tools),
        tool_choice=_tool_choice(message.tool_choice),
        tool_name=message.tool_choice.function if message.tool_choice.WhichOneof("choice") == "function" else None,
        parallel_tool_calls=message.parallel_tool_calls if message.HasField("parallel_tool_calls") else True,
        session=session,
        priority=message.priority,
        deadline_s=deadline_s,
    )


def completion_request(
    message: service_pb2.GenerateRequest, *, request_id: str, deadline_s: float | None, session: str = ""
) -> CompletionRequest:
    """The request of a Generate call.

    Raises:
        InvalidRequest: a prompt is neither text nor token ids.
    """
    return CompletionRequest(
        request_id=request_id,
        model=message.model,
        prompts=tuple(_prompt(number, one) for number, one in enumerate(message.prompts)),
        options=parse_options(message.options),
        echo=message.echo,
        session=session,
        priority=message.priority,
        deadline_s=deadline_s,
    )


def embedding_request(
    message: service_pb2.EmbedRequest, *, request_id: str, deadline_s: float | None, session: str = ""
) -> EmbeddingRequest:
    """The request of an Embed call.

    Raises:
        InvalidRequest: an input is neither text nor token ids.
    """
    return EmbeddingRequest(
        request_id=request_id,
        model=message.model,
        inputs=tuple(_prompt(number, one, param="input") for number, one in enumerate(message.inputs)),
        dimensions=message.dimensions if message.HasField("dimensions") else None,
        session=session,
        priority=message.priority,
        deadline_s=deadline_s,
    )


def tokenize_request(message: service_pb2.TokenizeRequest) -> TokenizeRequest:
    """The request of a Tokenize call.

    Raises:
        InvalidRequest: there is neither text nor conversation.
    """
    kind = message.WhichOneof("input")
    if kind is None:
        raise InvalidRequest("the request has nothing to tokenize: set text or conversation", param="input")
    conversation = tuple(_message(one) for one in message.conversation.messages)
    return TokenizeRequest(
        model=message.model,
        input=message.text if kind == "text" else conversation,
        add_special_tokens=message.add_special_tokens if message.HasField("add_special_tokens") else True,
    )


def parse_so_far(messages: Iterable[messages_pb2.SoFar]) -> tuple[SoFar, ...]:
    return tuple(SoFar(choice=one.index, tokens=tuple(one.token_ids), finished=one.finished) for one in messages)


def parse_options(message: messages_pb2.Options) -> Options:
    given = {name: getattr(message, name) for name in OPTIONAL if message.HasField(name)}
    return Options(
        **given,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        format=_format(message.response_format) if message.HasField("response_format") else None,
    )


def _format(message: messages_pb2.ResponseFormat) -> ResponseFormat | None:
    match message.WhichOneof("format"):
        case "json_object":
            return ResponseFormat(kind="json_object") if message.json_object else None
        case "json_schema":
            return ResponseFormat(kind="json_schema", text=message.json_schema)
        case "regex":
            return ResponseFormat(kind="regex", text=message.regex)
        case "choices":
            return ResponseFormat(kind="choice", choices=tuple(message.choices.texts))
        case "grammar":
            return ResponseFormat(kind="grammar", text=message.grammar)
        case _:
            raise InvalidRequest("response_format is empty: set one of its fields", param="response_format")


def _tool(message: messages_pb2.Tool) -> Tool:
    parameters = message.parameters if message.HasField("parameters") else NO_PARAMETERS
    return Tool(name=message.name, description=message.description, parameters=parameters)


def _tool_choice(message: messages_pb2.ToolChoice) -> str:
    """A mode that this server does not know becomes one that the service refuses."""
    if message.WhichOneof("choice") == "function":
        return "function"
    known = messages_pb2.ToolChoiceMode.DESCRIPTOR.values_by_number.get(message.mode)
    name = known.name.removeprefix("TOOL_CHOICE_MODE_").lower() if known else str(message.mode)
    return "auto" if name == "unspecified" else name


def _message(message: messages_pb2.Message) -> Message:
    return Message(
        role=_role(message.role),
        content=message.content,
        name=message.name if message.HasField("name") else None,
        tool_calls=tuple(ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in message.tool_calls),
        tool_call_id=message.tool_call_id if message.HasField("tool_call_id") else None,
    )


def _role(value: int) -> str:
    """ROLE_USER becomes "user". A role that this server does not know becomes its number, which the service refuses."""
    known = messages_pb2.Role.DESCRIPTOR.values_by_number.get(value)
    return known.name.removeprefix("ROLE_").lower() if known else str(value)


def _prompt(number: int, prompt: messages_pb2.Prompt, *, param: str = "prompt") -> str | tuple[int, ...]:
    match prompt.WhichOneof("content"):
        case "text":
            return prompt.text
        case "token_ids":
            return tuple(prompt.token_ids.ids)
        case _:
            raise InvalidRequest(f"{param} {number} has neither text nor token_ids", param=param)
