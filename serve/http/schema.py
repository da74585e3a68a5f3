"""Step 1 of a request, over HTTP: OpenAI's fields, strictly typed. Whether values make sense is `serve.validation`'s to say.

A field that this server does not know is ignored and named in a response header; one that it knows and does not offer
yet is refused as soon as it asks for something.
"""

import re
from collections.abc import Mapping
from itertools import islice
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, ValidationError, WithJsonSchema

from serve.errors import InvalidRequest, NotSupported
from serve.http.formats import GUIDED, ToolBody, ToolCallBody, allowed_tools, form_of, tool_choice
from serve.http.parts import bias_table, joined_text, list_or_none, prompt_list, stop_list
from serve.limits import Limits
from serve.request import ChatRequest, CompletionRequest, Message, Options

HEADER_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
STRINGS = {"type": "array", "items": {"type": "string"}}
PROMPTS: dict[str, Any] = {"anyOf": [{"type": "string"}, STRINGS, {"type": "array", "items": {"type": "integer"}}, {"type": "array"}]}
TEXT_PART = {"type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}}, "required": ["type", "text"]}

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
    "prompt_logprobs": (None,),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "use_beam_search": (None, False),
}
"""Fields that are not offered, with the values that ask for nothing."""
WITHOUT_EFFECT = frozenset({"user"})
"""Taken and rightly without effect, so not named as ignored."""


FORMS = ("response_format", "structured_outputs", *GUIDED)


class Body(BaseModel):
    """JSON types are strict: "0.5" is no number, true is no number, 1.0 is no integer."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class StreamOptions(Body):
    include_usage: bool | None = None
    """A last chunk with `usage` and no choices."""
    continuous_usage_stats: bool | None = None
    """`usage` in every chunk (vLLM)."""


class NamedBody(Body):
    """What every API takes."""

    model: str
    user: str | None = None
    priority: int | None = None


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
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: Annotated[list[str], BeforeValidator(stop_list), WithJsonSchema({"anyOf": [{"type": "string"}, STRINGS]})] = []
    stop_token_ids: Annotated[list[int], FailFast(), BeforeValidator(list_or_none)] = []  # FailFast: one error, not a million
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
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
            n=self.n,
            max_tokens=self.length(),
            min_tokens=self.min_tokens,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=bool(self.ignore_eos),
            logprobs=self.alternatives(),
            format=form_of({name: getattr(self, name) for name in FORMS}),
        )

    def length(self) -> int | None:
        return self.max_tokens

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
    tool_calls: list[ToolCallBody] | None = None
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
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Annotated[list[ToolBody] | None, FailFast()] = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    def length(self) -> int | None:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequest("max_tokens and max_completion_tokens say different things; send one", param="max_tokens")
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def alternatives(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def request(self, request_id: str) -> ChatRequest:
        allowed = allowed_tools(self.tool_choice)
        choice, name = tool_choice(self.tool_choice) if allowed is None else (allowed[0], None)
        return ChatRequest(
            request_id=request_id,
            model=self.model,
            messages=tuple(message.message(at) for at, message in enumerate(self.messages)),
            options=self.options(),
            tools=tuple(tool.tool() for tool in self.tools or ()),
            tool_choice=choice,
            tool_name=name,
            allowed_tools=None if allowed is None else allowed[1],
            parallel_tool_calls=self.parallel_tool_calls is not False,
        )


class CompletionBody(SharedBody):
    """Body of /v1/completions."""

    prompt: Annotated[
        list[str | list[int]],
        BeforeValidator(prompt_list),
        WithJsonSchema(PROMPTS),
    ]
    logprobs: int | None = None
    echo: bool | None = None

    def alternatives(self) -> int | None:
        return self.logprobs

    def request(self, request_id: str) -> CompletionRequest:
        prompts = tuple(prompt if isinstance(prompt, str) else tuple(prompt) for prompt in self.prompt)
        return CompletionRequest(request_id=request_id, model=self.model, prompts=prompts, options=self.options(), echo=bool(self.echo))


B = TypeVar("B", bound=NamedBody)
AnyBody = TypeVar("AnyBody", bound=Body)


def parse(kind: type[B], fields: Mapping[str, Any], limits: Limits) -> B:
    """
    Raises:
        InvalidRequest: the first thing that is of a wrong type or far too long, by its name.
        NotSupported: a field asks for what is not offered yet.
    """
    for name in NEUTRAL.keys() & fields.keys():
        if fields[name] not in NEUTRAL[name]:
            raise NotSupported(f"this server does not offer {name} yet; leave it out", param=name)
    body = validated(kind, fields, limits)
    if isinstance(body, SharedBody) and body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
    return body


def validated(kind: type[AnyBody], fields: Mapping[str, Any], limits: Limits) -> AnyBody:
    """
    Raises:
        InvalidRequest: the first thing that is of a wrong type or far too long, by its name.
    """
    _check_counts({name: fields[name] for name in fields.keys() & kind.model_fields.keys()}, limits)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _first_problem(error) from None


def _check_counts(fields: Mapping[str, Any], limits: Limits) -> None:
    """See `Limits.entries`."""
    for name, limit in limits.entries.items():
        value = fields.get(name)
        if isinstance(value, list | dict) and len(value) > limit:
            raise InvalidRequest(f"{name} has {len(value)} entries, and at most {limit} are taken", param=name)


def _first_problem(error: ValidationError) -> InvalidRequest:
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).removeprefix(".")
    if problem["type"] == "missing":
        return InvalidRequest(f"{param} is required", param=param)
    kind = NotSupported if problem["type"] == "not_supported" else InvalidRequest
    return kind(f"{param}: {problem['msg'].removeprefix('Input ')}", param=param)


def ignored_fields(kind: type[NamedBody], fields: Mapping[str, Any]) -> list[str]:
    """Names that had no effect, for a header: at most 16, and only such as a header can carry."""
    known = kind.model_fields.keys() | NEUTRAL.keys() | WITHOUT_EFFECT
    names = sorted(islice((name for name in fields if name not in known and HEADER_NAME.fullmatch(name)), 16))
    return names or (["(unprintable)"] if fields.keys() - known else [])
