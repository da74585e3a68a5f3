"""Place 1 of a request over HTTP: OpenAI's fields, strictly typed. Whether the values make sense is decided by `serve.validation`.

A field that this server does not know is ignored and named in a response header; so is one that only hints at how to answer. A field
that it knows and does not support is refused, unless its value asks for nothing.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from engine.counted import counted
from serve.errors import InvalidRequest, NotSupported, truncate
from serve.http.field_parsers import empty_if_none, join_text_parts, parse_logit_bias, parse_prompts, parse_stop
from serve.http.formats import GUIDED, ToolBody, ToolCallBody, ToolChoice, requested_format
from serve.limits import Limits
from serve.request import ChatRequest, CompletionRequest, Message, Options, ResponseFormat

MAX_KEY_CHARS = 64
"""Of a field's name in an error: keys of objects come from the client, and may be megabytes long."""
HEADER_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
STRINGS = {"type": "array", "items": {"type": "string"}}
PROMPTS: dict[str, Any] = {"anyOf": [{"type": "string"}, STRINGS, {"type": "array", "items": {"type": "integer"}}, {"type": "array"}]}
TEXT_PART = {"type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}}, "required": ["type", "text"]}


@dataclass(frozen=True)
class Unsupported:
    """How a field that is not supported is refused."""

    instead: str
    """What the client can do instead."""
    no_ops: tuple[Any, ...] = (None,)
    """Values that are accepted because they ask for nothing."""


UNSUPPORTED: Mapping[str, Unsupported] = {
    "functions": Unsupported("send tools", (None, [])),
    "function_call": Unsupported("send tool_choice", (None, "none", "auto")),
    "modalities": Unsupported("this model writes text", (None, ["text"])),
    "audio": Unsupported("this model writes text"),
    "web_search_options": Unsupported("this server does not search; use a function of your own in tools"),
    "moderation": Unsupported("this server does not moderate; leave it out"),
    "chat_template": Unsupported("the model's own template is used; leave it out"),
    "chat_template_kwargs": Unsupported("the model's template takes none; leave it out", (None, {}, {"enable_thinking": False})),
    "add_generation_prompt": Unsupported("leave it out", (None, True)),
    "continue_final_message": Unsupported("leave it out", (None, False)),
    "prompt_logprobs": Unsupported("use echo with logprobs in /v1/completions"),
    "best_of": Unsupported("use n for several answers", (None, 1)),
    "suffix": Unsupported("this model continues a text and cannot fill a gap; leave it out", (None, "")),
    "use_beam_search": Unsupported("leave it out", (None, False)),
}
IGNORED: Mapping[str, tuple[Any, ...]] = {
    "store": (None, False),
    "metadata": (None, {}),
    "service_tier": (None, "auto", "default"),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "prediction": (None,),
    "prompt_cache_options": (None, {}),
    "prompt_cache_retention": (None,),
}
"""Fields that have no effect, and that a correct answer does not depend on; with the values that ask for nothing."""


FORMAT_FIELDS = ("response_format", "structured_outputs", *GUIDED)


class Body(BaseModel):
    """JSON types are strict: "0.5" and true are not numbers, 1.0 is not an integer."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


def _refuse_padding(wanted: bool | None) -> bool | None:
    if wanted:
        raise PydanticCustomError("not_supported", "events are not padded here; leave it out")
    return wanted


class StreamOptions(Body):
    include_usage: bool | None = None
    """Send a last chunk with `usage` and no choices."""
    continuous_usage_stats: bool | None = None
    """Send `usage` in every chunk (vLLM)."""
    include_obfuscation: Annotated[bool | None, AfterValidator(_refuse_padding)] = None
    """Pad events so that their lengths reveal nothing about the text (OpenAI). Not supported."""


class ModelBody(Body):
    """Fields of every API that names a model."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = UNSUPPORTED
    ignored: ClassVar[Mapping[str, tuple[Any, ...]]] = IGNORED
    limit_names: ClassVar[Mapping[str, str]] = {}
    """By field, the name under which `Limits.entries` has its limit, if that is another."""

    model: str
    user: str | None = None
    priority: int | None = None

    @property
    def session_hint(self) -> str | None:
        """See `serve.session`."""
        return self.user

    def ignored_values(self, fields: Mapping[str, Any]) -> Iterable[str]:
        """Names of parts without effect in fields that have one. ``fields``: the body as it was sent."""
        return ()


class GenerationBody(ModelBody):
    """Fields of every API that generates text."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[
        list[tuple[int, float]],
        BeforeValidator(parse_logit_bias),
        WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
    ] = []
    seed: int | None = None
    min_tokens: int | None = None
    stop: Annotated[list[str], BeforeValidator(parse_stop), WithJsonSchema({"anyOf": [{"type": "string"}, STRINGS]})] = []
    stop_token_ids: Annotated[list[int], FailFast(), BeforeValidator(empty_if_none)] = []  # FailFast: one error, not a million
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str] | None, FailFast()] = None
    guided_grammar: str | None = None

    def options(self) -> Options:
        return Options(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple(self.logit_bias),
            seed=self.seed,
            n=self.num_choices(),
            max_tokens=self.requested_max_tokens(),
            min_tokens=self.min_tokens,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=bool(self.ignore_eos),
            logprobs=self.num_top_logprobs(),
            format=requested_format({name: getattr(self, name) for name in FORMAT_FIELDS}, self.own_format()),
        )

    @property
    def session_hint(self) -> str | None:
        return self.prompt_cache_key or self.user or self.safety_identifier

    def own_format(self) -> ResponseFormat | None:
        """The format asked for by a field that only this API has."""
        return None

    def num_choices(self) -> int | None:
        return None

    def requested_max_tokens(self) -> int | None:
        raise NotImplementedError

    def num_top_logprobs(self) -> int | None:
        raise NotImplementedError

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class MessageBody(Body):
    role: str
    content: Annotated[
        str | None, BeforeValidator(join_text_parts), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": TEXT_PART}]})
    ] = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCallBody] | None, FailFast()] = None
    tool_call_id: str | None = None
    id: Any = None
    """In a tool's message, used if there is no `tool_call_id`: Qwen-Agent sends it when it leaves tools to the server."""

    def message(self, at: int) -> Message:
        """Only a message with calls may have no content."""
        if self.content is None and not self.tool_calls:
            raise InvalidRequest(f"messages[{at}].content is required", param=f"messages[{at}].content")
        call_id = self.id if self.role == "tool" and self.tool_call_id is None and isinstance(self.id, str) else self.tool_call_id
        return Message(
            role="system" if self.role == "developer" else self.role,  # OpenAI's newer name for it
            content=self.content or "",
            name=self.name,
            tool_calls=tuple(call.call() for call in self.tool_calls or ()),
            tool_call_id=call_id,
        )


class ChatBody(GenerationBody):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[MessageBody], FailFast()]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Annotated[list[ToolBody] | None, FailFast()] = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    def num_choices(self) -> int | None:
        return self.n

    def requested_max_tokens(self) -> int | None:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequest("max_tokens and max_completion_tokens differ; send one of them", param="max_tokens")
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def num_top_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def request(self, request_id: str) -> ChatRequest:
        tool_choice = ToolChoice.parse(self.tool_choice)
        return ChatRequest(
            request_id=request_id,
            model=self.model,
            messages=tuple(message.message(at) for at, message in enumerate(self.messages)),
            options=self.options(),
            tools=tuple(tool.tool() for tool in self.tools or ()),
            tool_choice=tool_choice.mode,
            tool_name=tool_choice.name,
            allowed_tools=tool_choice.allowed,
            parallel_tool_calls=self.parallel_tool_calls is not False,
        )


class CompletionBody(GenerationBody):
    """Body of /v1/completions."""

    prompt: Annotated[
        list[str | list[int]],
        BeforeValidator(parse_prompts),
        WithJsonSchema(PROMPTS),
    ]
    max_tokens: int | None = None
    n: int | None = None
    logprobs: int | None = None
    echo: bool | None = None

    def num_choices(self) -> int | None:
        return self.n

    def requested_max_tokens(self) -> int | None:
        return self.max_tokens

    def num_top_logprobs(self) -> int | None:
        return self.logprobs

    def request(self, request_id: str) -> CompletionRequest:
        prompts = tuple(prompt if isinstance(prompt, str) else tuple(prompt) for prompt in self.prompt)
        return CompletionRequest(request_id=request_id, model=self.model, prompts=prompts, options=self.options(), echo=bool(self.echo))


def json_equal(value: Any, one: Any) -> bool:
    """Whether two JSON values are the same: true is not 1, and 1.0 is not 1, at any depth."""
    if type(value) is not type(one) or value != one:
        return False
    if isinstance(one, dict):
        return all(json_equal(value[key], one[key]) for key in one)
    return not isinstance(one, list) or all(map(json_equal, value, one))


B = TypeVar("B", bound=ModelBody)
AnyBody = TypeVar("AnyBody", bound=Body)


def parse(kind: type[B], fields: Mapping[str, Any], limits: Limits) -> B:
    """The body of type ``kind``, refused if a field asks for something unsupported.

    Raises:
        InvalidRequest: names the first field that has a wrong type or far too many entries.
        NotSupported: a field asks for something that is not supported.
    """
    for name in kind.unsupported.keys() & fields.keys():
        if not any(json_equal(fields[name], one) for one in kind.unsupported[name].no_ops):
            raise NotSupported(f"{name} is not supported here: {kind.unsupported[name].instead}", param=name)
    body = validate(kind, fields, limits)
    if isinstance(body, GenerationBody) and body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
    return body


def validate(kind: type[AnyBody], fields: Mapping[str, Any], limits: Limits) -> AnyBody:
    """The body of type ``kind``, with the types of its fields checked.

    Raises:
        InvalidRequest: names the first field that has a wrong type or far too many entries.
    """
    _check_counts(kind, fields, limits)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _first_problem(error) from None


def _check_counts(kind: type[Body], fields: Mapping[str, Any], limits: Limits) -> None:
    """Checks `Limits.entries` before pydantic looks at any entry."""
    names: Mapping[str, str] = kind.limit_names if issubclass(kind, ModelBody) else {}
    entries = limits.entries
    for name in fields.keys() & kind.model_fields.keys():
        limit, value = entries.get(names.get(name, name)), fields[name]
        if limit is not None and isinstance(value, list | dict) and len(value) > limit:
            raise InvalidRequest(f"{name} has {len(value)} entries, and may have at most {limit}", param=name)
    if "messages" in kind.model_fields:
        _check_calls(fields.get("messages"), limits)


def _check_calls(messages: Any, limits: Limits) -> None:
    for at, message in enumerate(messages if isinstance(messages, list) else ()):
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        if isinstance(calls, list) and len(calls) > limits.tool_calls:
            raise InvalidRequest(f"at most {counted(limits.tool_calls, 'call')} may be given", param=f"messages[{at}].tool_calls")


def _first_problem(error: ValidationError) -> InvalidRequest:
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{truncate(part, MAX_KEY_CHARS)}" for part in problem["loc"])
    param = param.removeprefix(".")
    if problem["type"] == "missing":
        return InvalidRequest(f"{param} is required", param=param)
    kind = NotSupported if problem["type"] == "not_supported" else InvalidRequest
    return kind(f"{param}: {problem['msg'].removeprefix('Input ')}", param=param)


def ignored_fields(body: ModelBody, fields: Mapping[str, Any]) -> list[str]:
    """Names of fields without effect, for a header: at most 16, and only names that a header can carry."""
    unknown = fields.keys() - type(body).model_fields.keys() - body.unsupported.keys()
    without_effect = [name for name in unknown if not any(json_equal(fields[name], one) for one in body.ignored.get(name, ()))]
    names = sorted(islice((name for name in (*without_effect, *body.ignored_values(fields)) if HEADER_NAME.fullmatch(name)), 16))
    return names or (["(unprintable)"] if without_effect else [])
