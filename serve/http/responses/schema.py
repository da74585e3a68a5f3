"""Place 1 of a request to /v1/responses: the fields of its body."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import FailFast, Field, ValidatorFunctionWrapHandler, WithJsonSchema, WrapValidator

from serve.errors import InvalidRequest
from serve.http.field_parsers import shape_error
from serve.http.formats import ToolChoice, response_format, to_json
from serve.http.responses.items import ROLES, Conversation, conversation_of, ignored_items
from serve.http.schema import IGNORED, UNSUPPORTED, Body, GenerationBody, Unsupported
from serve.limits import Limits
from serve.request import NO_PARAMETERS, ChatRequest, Message, ResponseFormat, Tool

LOGPROBS = "message.output_text.logprobs"
NOT_STORED = "nothing is stored here; send the whole conversation so far as input"
_TEXT: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {"type": "object", "properties": {"type": {"enum": ["input_text", "output_text"]}, "text": {"type": "string"}}},
        },
    ]
}


def _item(kind: str, required: Iterable[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"type": {"const": kind}, **properties}, "required": [*required]}


_STRING = {"type": "string"}
ITEMS = [
    _item("message", ("role", "content"), role={"enum": [*ROLES]}, content=_TEXT),
    _item("function_call", ("type", "call_id", "name", "arguments"), call_id=_STRING, name=_STRING, arguments=_STRING),
    _item("function_call_output", ("type", "call_id", "output"), call_id=_STRING, output=_TEXT),
    _item("reasoning", ("type",)),
]
INPUT = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"anyOf": ITEMS}}]}


def _is_hosted_tool(tool: Any) -> bool:
    return isinstance(tool, dict) and isinstance(tool.get("type"), str) and tool["type"] != "function"


class FunctionTool(Body):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Has no effect: arguments always fit their schema here."""

    def tool(self) -> Tool:
        parameters = NO_PARAMETERS if self.parameters is None else to_json(self.parameters)
        return Tool(name=self.name, description=self.description or "", parameters=parameters)

    def response_object(self) -> dict[str, Any]:
        """As the response repeats it."""
        return self.model_dump() | {"strict": self.strict is not False}


HOSTED_TOOL = FunctionTool.model_construct(type="function", name="")
"""Stands for a tool that OpenAI runs on its servers. Command-line agents always offer some; here they are ignored."""


def _function(tool: Any, read: ValidatorFunctionWrapHandler) -> FunctionTool:
    if _is_hosted_tool(tool):
        return HOSTED_TOOL
    if isinstance(tool, dict) and "name" not in tool and "function" in tool:
        raise shape_error(
            "should have name, description and parameters beside its type; only /v1/chat/completions has them inside function"
        )
    function: FunctionTool = read(tool)
    return function


class TextSettings(Body):
    format: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponsesBody(GenerationBody):
    """Body of /v1/responses."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        **UNSUPPORTED,
        "previous_response_id": Unsupported(NOT_STORED),
        "conversation": Unsupported(NOT_STORED),
        "prompt": Unsupported("nothing is stored here; send its text as instructions or input"),
        "background": Unsupported("responses are not stored; use stream, or wait for the response", (None, False)),
        "context_management": Unsupported(
            "the context is not edited here; leave out of the input what the model need not read", (None, [])
        ),
        "n": Unsupported("a response has one choice", (None, 1)),
        "messages": Unsupported("send them as input"),
        "max_tokens": Unsupported("send max_output_tokens"),
        "max_completion_tokens": Unsupported("send max_output_tokens"),
    }
    ignored: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **IGNORED,
        "reasoning": (None, {}, {"effort": None}, {"effort": "none"}),
        "truncation": (None, "disabled"),
        "max_tool_calls": (None,),
    }
    limit_names: ClassVar[Mapping[str, str]] = {"input": "messages"}

    input: Annotated[Any, WithJsonSchema(INPUT)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=Limits.metadata
    )
    tools: Annotated[list[Annotated[FunctionTool, WrapValidator(_function)]] | None, FailFast()] = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    include: Annotated[
        list[
            Literal[
                "message.output_text.logprobs",
                "reasoning.encrypted_content",
                "message.input_image.image_url",
                "file_search_call.results",
                "web_search_call.results",
                "web_search_call.action.sources",
                "computer_call_output.output.image_url",
                "code_interpreter_call.outputs",
            ]
        ]
        | None,
        FailFast(),
    ] = None
    """All but the first are parts of items that no response has here, so they have no effect."""
    top_logprobs: int | None = None

    def requested_max_tokens(self) -> int | None:
        return self.max_output_tokens

    @property
    def functions(self) -> dict[int, FunctionTool]:
        """By index among the tools."""
        return {at: tool for at, tool in enumerate(self.tools or ()) if tool is not HOSTED_TOOL}

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    def num_top_logprobs(self) -> int | None:
        if self.top_logprobs and not self.wants_logprobs:
            raise InvalidRequest(f'top_logprobs needs "{LOGPROBS}" in include', param="top_logprobs")
        return (self.top_logprobs or 0) if self.wants_logprobs else None

    def own_format(self) -> ResponseFormat | None:
        return response_format(self.text and self.text.format, param="text.format", nested=False)

    def ignored_values(self, fields: Mapping[str, Any]) -> Iterable[str]:
        if self.text is not None and self.text.verbosity not in (None, "medium"):
            yield "text.verbosity"
        yield from (f"input.{kind}" for kind in ignored_items(self.input))
        yield from {f"tools.{tool['type']}" for tool in fields.get("tools") or () if _is_hosted_tool(tool)}

    def conversation(self) -> Conversation:
        """The conversation so far.

        Raises:
            InvalidRequest, NotSupported: see `conversation_of`.
        """
        return conversation_of(self.instructions, self.input)

    def request(self, request_id: str, messages: Iterable[Message]) -> ChatRequest:
        """``messages``: those of `conversation`."""
        tool_choice = ToolChoice.parse(_as_in_chat(self.tool_choice))
        return ChatRequest(
            request_id=request_id,
            model=self.model,
            messages=tuple(messages),
            options=self.options(),
            tools=tuple(tool.tool() for tool in self.functions.values()),
            tool_choice=tool_choice.mode,
            tool_name=tool_choice.name,
            allowed_tools=tool_choice.allowed,
            parallel_tool_calls=self.parallel_tool_calls is not False,
        )


def _as_in_chat(choice: Any) -> Any:
    """The ``tool_choice`` in the form of /v1/chat/completions, where the name is inside ``function`` and not beside ``type``."""
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        tools = choice.get("tools")
        named = [_as_in_chat(tool) for tool in tools] if isinstance(tools, list) else None
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": named}}
    return choice
