"""Step 1 of a request, over HTTP: OpenAI's fields, strictly typed. Whether values make sense is `serve.validation`'s to say.

A field that this server does not know is ignored and named in a response header, as is one that only hints at how to answer; one that
it knows and does not offer is refused as soon as it asks for something.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from serve.errors import InvalidRequest, NotSupported, clipped
from serve.http.field_parsers import bias_table, joined_text, list_or_none, prompt_list, stop_list
from serve.http.formats import GUIDED, Choosing, ToolBody, ToolCallBody, form_of
from serve.limits import Limits
from serve.request import ChatRequest, CompletionRequest, Message, Options, ResponseFormat

MOST_KEY_CHARS = 64
"""Of a name that stands in an error: keys of tables are the client's, and may be megabytes long."""
HEADER_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
STRINGS = {"type": "array", "items": {"type": "string"}}
PROMPTS: dict[str, Any] = {"anyOf": [{"type": "string"}, STRINGS, {"type": "array", "items": {"type": "integer"}}, {"type": "array"}]}
TEXT_PART = {"type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}}, "required": ["type", "text"]}


@dataclass(frozen=True)
class Absent:
    """A field that is not offered."""

    instead: str
    """What would do."""
    nothing: tuple[Any, ...] = (None,)
    """Values that ask for nothing."""


NOT_OFFERED: Mapping[str, Absent] = {
    "functions": Absent("send tools", (None, [])),
    "function_call": Absent("send tool_choice", (None, "none", "auto")),
    "modalities": Absent("this model writes text", (None, ["text"])),
    "audio": Absent("this model writes text"),
    "web_search_options": Absent("nothing is searched here; a function of your own among the tools can do it"),
    "moderation": Absent("nothing is moderated here; leave it out"),
    "chat_template": Absent("the model's own is used; leave it out"),
    "chat_template_kwargs": Absent("the model's template takes none; leave it out", (None, {}, {"enable_thinking": False})),
    "add_generation_prompt": Absent("leave it out", (None, True)),
    "continue_final_message": Absent("leave it out", (None, False)),
    "prompt_logprobs": Absent("/v1/completions has echo with logprobs"),
    "best_of": Absent("n gives several answers", (None, 1)),
    "suffix": Absent("this model goes on with a text, and fills no gaps", (None, "")),
    "use_beam_search": Absent("leave it out", (None, False)),
}
HINTS: Mapping[str, tuple[Any, ...]] = {
    "store": (None, False),
    "metadata": (None, {}),
    "service_tier": (None, "auto", "default"),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "prediction": (None,),
    "prompt_cache_options": (None, {}),
    "prompt_cache_retention": (None,),
}
"""Fields that have no effect, and without which an answer is as good; with the values that ask for nothing."""


FORMS = ("response_format", "structured_outputs", *GUIDED)


class Body(BaseModel):
    """JSON types are strict: "0.5" is no number, true is no number, 1.0 is no integer."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


def _unpadded(wanted: bool | None) -> bool | None:
    if wanted:
        raise PydanticCustomError("not_supported", "events are not padded here; leave it out")
    return wanted


class StreamOptions(Body):
    include_usage: bool | None = None
    """A last chunk with `usage` and no choices."""
    continuous_usage_stats: bool | None = None
    """`usage` in every chunk (vLLM)."""
    include_obfuscation: Annotated[bool | None, AfterValidator(_unpadded)] = None
    """Lengths of pieces hidden from those who only see them pass (OpenAI)."""


class NamedBody(Body):
    """What every API takes."""

    not_offered: ClassVar[Mapping[str, Absent]] = NOT_OFFERED
    hints: ClassVar[Mapping[str, tuple[Any, ...]]] = HINTS
    counted: ClassVar[Mapping[str, str]] = {}
    """Fields whose entries `Limits` counts under another name."""

    model: str
    user: str | None = None
    priority: int | None = None

    @property
    def belongs_to(self) -> str | None:
        """See `serve.session`."""
        return self.user

    def without_effect(self, fields: Mapping[str, Any]) -> Iterable[str]:
        """Names of what has no effect within fields that have one. ``fields``: as they were sent."""
        return ()


class SharedBody(NamedBody):
    """What both APIs that go on with texts take."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[
        list[tuple[int, float]], BeforeValidator(bias_table), WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}})
    ] = []
    seed: int | None = None
    min_tokens: int | None = None
    stop: Annotated[list[str], BeforeValidator(stop_list), WithJsonSchema({"anyOf": [{"type": "string"}, STRINGS]})] = []
    stop_token_ids: Annotated[list[int], FailFast(), BeforeValidator(list_or_none)] = []  # FailFast: one error, not a million
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
            max_tokens=self.length(),
            min_tokens=self.min_tokens,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=bool(self.ignore_eos),
            logprobs=self.alternatives(),
            format=form_of({name: getattr(self, name) for name in FORMS}, self.own_form()),
        )

    @property
    def belongs_to(self) -> str | None:
        return self.prompt_cache_key or self.user or self.safety_identifier

    def own_form(self) -> ResponseFormat | None:
        """What a field asks for that only one API has."""
        return None

    def num_choices(self) -> int | None:
        return None

    def length(self) -> int | None:
        raise NotImplementedError

    def alternatives(self) -> int | None:
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
        str | None, BeforeValidator(joined_text), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": TEXT_PART}]})
    ] = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCallBody] | None, FailFast()] = None
    tool_call_id: str | None = None
    id: Any = None
    """Of a tool's message without `tool_call_id`: the same. Qwen-Agent says it so where it leaves tools to the server."""

    def message(self, at: int) -> Message:
        """Only a call can do without content."""
        if self.content is None and not self.tool_calls:
            raise InvalidRequest(f"messages[{at}].content is required", param=f"messages[{at}].content")
        answers = self.id if self.role == "tool" and self.tool_call_id is None and isinstance(self.id, str) else self.tool_call_id
        return Message(
            role="system" if self.role == "developer" else self.role,  # OpenAI's newer name for it
            content=self.content or "",
            name=self.name,
            tool_calls=tuple(call.call() for call in self.tool_calls or ()),
            tool_call_id=answers,
        )


class ChatBody(SharedBody):
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

    def length(self) -> int | None:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequest("max_tokens and max_completion_tokens say different things; send one", param="max_tokens")
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def alternatives(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def request(self, request_id: str) -> ChatRequest:
        choosing = Choosing.of(self.tool_choice)
        return ChatRequest(
            request_id=request_id,
            model=self.model,
            messages=tuple(message.message(at) for at, message in enumerate(self.messages)),
            options=self.options(),
            tools=tuple(tool.tool() for tool in self.tools or ()),
            tool_choice=choosing.mode,
            tool_name=choosing.name,
            allowed_tools=choosing.allowed,
            parallel_tool_calls=self.parallel_tool_calls is not False,
        )


class CompletionBody(SharedBody):
    """Body of /v1/completions."""

    prompt: Annotated[
        list[str | list[int]],
        BeforeValidator(prompt_list),
        WithJsonSchema(PROMPTS),
    ]
    max_tokens: int | None = None
    n: int | None = None
    logprobs: int | None = None
    echo: bool | None = None

    def num_choices(self) -> int | None:
        return self.n

    def length(self) -> int | None:
        return self.max_tokens

    def alternatives(self) -> int | None:
        return self.logprobs

    def request(self, request_id: str) -> CompletionRequest:
        prompts = tuple(prompt if isinstance(prompt, str) else tuple(prompt) for prompt in self.prompt)
        return CompletionRequest(request_id=request_id, model=self.model, prompts=prompts, options=self.options(), echo=bool(self.echo))


def same(value: Any, one: Any) -> bool:
    """Of JSON: true is not 1, 1.0 is not 1, at any depth."""
    if type(value) is not type(one) or value != one:
        return False
    if isinstance(one, dict):
        return all(same(value[key], one[key]) for key in one)
    return not isinstance(one, list) or all(map(same, value, one))


B = TypeVar("B", bound=NamedBody)
AnyBody = TypeVar("AnyBody", bound=Body)


def parse(kind: type[B], fields: Mapping[str, Any], limits: Limits) -> B:
    """
    Raises:
        InvalidRequest: the first thing that is of a wrong type or far too long, by its name.
        NotSupported: a field asks for what is not offered.
    """
    for name in kind.not_offered.keys() & fields.keys():
        if not any(same(fields[name], one) for one in kind.not_offered[name].nothing):
            raise NotSupported(f"{name} is not offered here: {kind.not_offered[name].instead}", param=name)
    body = validated(kind, fields, limits)
    if isinstance(body, SharedBody) and body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
    return body


def validated(kind: type[AnyBody], fields: Mapping[str, Any], limits: Limits) -> AnyBody:
    """
    Raises:
        InvalidRequest: the first thing that is of a wrong type or far too long, by its name.
    """
    _check_counts(kind, fields, limits)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _first_problem(error) from None


def _check_counts(kind: type[Body], fields: Mapping[str, Any], limits: Limits) -> None:
    """See `Limits.entries`."""
    names: Mapping[str, str] = kind.counted if issubclass(kind, NamedBody) else {}
    entries = limits.entries
    for name in fields.keys() & kind.model_fields.keys():
        limit, value = entries.get(names.get(name, name)), fields[name]
        if limit is not None and isinstance(value, list | dict) and len(value) > limit:
            raise InvalidRequest(f"{name} has {len(value)} entries, and at most {limit} are taken", param=name)
    if "messages" in kind.model_fields:
        _check_calls(fields.get("messages"), limits)


def _check_calls(messages: Any, limits: Limits) -> None:
    for at, message in enumerate(messages if isinstance(messages, list) else ()):
        calls = message.get("tool_calls") if isinstance(message, dict) else None
        if isinstance(calls, list) and len(calls) > limits.tool_calls:
            raise InvalidRequest(f"at most {limits.tool_calls} calls are taken", param=f"messages[{at}].tool_calls")


def _first_problem(error: ValidationError) -> InvalidRequest:
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{clipped(part, MOST_KEY_CHARS)}" for part in problem["loc"])
    param = param.removeprefix(".")
    if problem["type"] == "missing":
        return InvalidRequest(f"{param} is required", param=param)
    kind = NotSupported if problem["type"] == "not_supported" else InvalidRequest
    return kind(f"{param}: {problem['msg'].removeprefix('Input ')}", param=param)


def ignored_fields(body: NamedBody, fields: Mapping[str, Any]) -> list[str]:
    """Names that had no effect, for a header: at most 16, and only such as a header can carry."""
    unknown = fields.keys() - type(body).model_fields.keys() - body.not_offered.keys()
    said = [name for name in unknown if not any(same(fields[name], one) for one in body.hints.get(name, ()))]
    names = sorted(islice((name for name in (*said, *body.without_effect(fields)) if HEADER_NAME.fullmatch(name)), 16))
    return names or (["(unprintable)"] if said else [])
