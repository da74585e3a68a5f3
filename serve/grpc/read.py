"""Step 1 of a request over gRPC: from protobuf to what the service takes. Values are judged there, for both fronts."""

from serve.errors import InvalidRequest
from serve.grpc.generated import messages_pb2, service_pb2
from serve.request import ChatRequest, CompletionRequest, Message, Options, TokenizeRequest

SAID_OR_NOT = (
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
"""Options of one value, which are None where the client did not say."""


def chat_request(message: service_pb2.ChatRequest, *, request_id: str, deadline_s: float | None, session: str = "") -> ChatRequest:
    return ChatRequest(
        request_id=request_id,
        model=message.model,
        messages=tuple(_message(one) for one in message.messages),
        options=options(message.options),
        session=session,
        priority=message.priority,
        deadline_s=deadline_s,
    )


def completion_request(
    message: service_pb2.GenerateRequest, *, request_id: str, deadline_s: float | None, session: str = ""
) -> CompletionRequest:
    """
    Raises:
        InvalidRequest: a prompt is neither text nor token ids.
    """
    return CompletionRequest(
        request_id=request_id,
        model=message.model,
        prompts=tuple(_prompt(number, one) for number, one in enumerate(message.prompts)),
        options=options(message.options),
        echo=message.echo,
        session=session,
        priority=message.priority,
        deadline_s=deadline_s,
    )


def tokenize_request(message: service_pb2.TokenizeRequest) -> TokenizeRequest:
    """
    Raises:
        InvalidRequest: there is neither text nor conversation.
    """
    kind = message.WhichOneof("input")
    if kind is None:
        raise InvalidRequest("say a text or a conversation to tokenize", param="input")
    conversation = tuple(_message(one) for one in message.conversation.messages)
    return TokenizeRequest(
        model=message.model,
        input=message.text if kind == "text" else conversation,
        add_special_tokens=message.add_special_tokens if message.HasField("add_special_tokens") else True,
    )


def options(message: messages_pb2.Options) -> Options:
    said = {name: getattr(message, name) for name in SAID_OR_NOT if message.HasField(name)}
    return Options(
        **said,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
    )


def _message(message: messages_pb2.Message) -> Message:
    return Message(role=_role(message.role), content=message.content, name=message.name if message.HasField("name") else None)


def _role(value: int) -> str:
    """ROLE_USER as "user"; what this server does not know as a role that the service will refuse by name."""
    known = messages_pb2.Role.DESCRIPTOR.values_by_number.get(value)
    return known.name.removeprefix("ROLE_").lower() if known else str(value)


def _prompt(number: int, prompt: messages_pb2.Prompt) -> str | tuple[int, ...]:
    match prompt.WhichOneof("content"):
        case "text":
            return prompt.text
        case "token_ids":
            return tuple(prompt.token_ids.ids)
        case _:
            raise InvalidRequest(f"prompt {number} has neither text nor token_ids", param="prompt")
