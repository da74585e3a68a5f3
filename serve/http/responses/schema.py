"""Step 1 of a request to /v1/responses: its fields."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import FailFast, Field, ValidatorFunctionWrapHandler, WithJsonSchema, WrapValidator

from serve.errors import InvalidRequest
from serve.http.field_parsers import wrong
from serve.http.formats import Choosing, as_text, response_format
from serve.http.responses.items import ROLES, Conversation, conversation_of, passed_over
from serve.http.schema import HINTS, NOT_OFFERED, Absent, Body, SharedBody
from serve.limits import Limits
from serve.request import NO_PARAMETERS, ChatRequest, Message, ResponseFormat, Tool

LOGPROBS = "message.output_text.logprobs"
UNSTORED = "nothing is stored here; send the whole conversation so far as input"
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


def _is_run_elsewhere(tool: Any) -> bool:
    return isinstance(tool, dict) and isinstance(tool.get("type"), str) and tool["type"] != "function"


class FunctionTool(Body):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Arguments always fit their schema here."""

    def tool(self) -> Tool:
        parameters = NO_PARAMETERS if self.parameters is None else as_text(self.parameters)
        return Tool(name=self.name, description=self.description or "", parameters=parameters)

    def told(self) -> dict[str, Any]:
        """As an answer repeats it."""
        return self.model_dump() | {"strict": self.strict is not False}


ELSEWHERE = FunctionTool.model_construct(type="function", name="")
"""Stands where a client has a tool that OpenAI would run: offered to the model, not asked for; command-line agents always offer some."""


def _function(tool: Any, read: ValidatorFunctionWrapHandler) -> FunctionTool:
    if _is_run_elsewhere(tool):
        return ELSEWHERE
    if isinstance(tool, dict) and "name" not in tool and "function" in tool:
        raise wrong("should have name, description and parameters beside its type; within function they belong to /v1/chat/completions")
    function: FunctionTool = read(tool)
    return function


class TextSettings(Body):
    format: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponsesBody(SharedBody):
    """Body of /v1/responses."""

    not_offered: ClassVar[Mapping[str, Absent]] = {
        **NOT_OFFERED,
        "previous_response_id": Absent(UNSTORED),
        "conversation": Absent(UNSTORED),
        "prompt": Absent("nothing is stored here; send its text as instructions or input"),
        "background": Absent("an answer that nobody waits for is not stored; ask with stream, or wait", (None, False)),
        "context_management": Absent("nothing of a conversation is taken together or left out here", (None, [])),
        "n": Absent("a response has one answer", (None, 1)),
        "messages": Absent("they are this API's input"),
        "max_tokens": Absent("it is this API's max_output_tokens"),
        "max_completion_tokens": Absent("it is this API's max_output_tokens"),
    }
    hints: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **HINTS,
        "reasoning": (None, {}, {"effort": None}, {"effort": "none"}),
        "truncation": (None, "disabled"),
        "max_tool_calls": (None,),
    }
    counted: ClassVar[Mapping[str, str]] = {"input": "messages"}

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
    """All but the first are of items that no answer has here, so that there is nothing to include."""
    top_logprobs: int | None = None

    def length(self) -> int | None:
        return self.max_output_tokens

    @property
    def functions(self) -> dict[int, FunctionTool]:
        """By where they stand among the tools."""
        return {at: tool for at, tool in enumerate(self.tools or ()) if tool is not ELSEWHERE}

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    def alternatives(self) -> int | None:
        if self.top_logprobs and not self.wants_logprobs:
            raise InvalidRequest(f'top_logprobs needs include to hold "{LOGPROBS}"', param="top_logprobs")
        return (self.top_logprobs or 0) if self.wants_logprobs else None

    def own_form(self) -> ResponseFormat | None:
        return response_format(self.text and self.text.format, param="text.format", nested=False)

    def without_effect(self, fields: Mapping[str, Any]) -> Iterable[str]:
        if self.text is not None and self.text.verbosity not in (None, "medium"):
            yield "text.verbosity"
        yield from (f"input.{kind}" for kind in passed_over(self.input))
        yield from {f"tools.{tool['type']}" for tool in fields.get("tools") or () if _is_run_elsewhere(tool)}

    def conversation(self) -> Conversation:
        """
        Raises:
            InvalidRequest, NotSupported: an item cannot be used.
        """
        return conversation_of(self.instructions, self.input)

    def request(self, request_id: str, messages: Iterable[Message]) -> ChatRequest:
        """``messages``: those of `conversation`."""
        choosing = Choosing.of(_as_in_chats(self.tool_choice))
        return ChatRequest(
            request_id=request_id,
            model=self.model,
            messages=tuple(messages),
            options=self.options(),
            tools=tuple(tool.tool() for tool in self.functions.values()),
            tool_choice=choosing.mode,
            tool_name=choosing.name,
            allowed_tools=choosing.allowed,
            parallel_tool_calls=self.parallel_tool_calls is not False,
        )


def _as_in_chats(choice: Any) -> Any:
    """A ``tool_choice`` as /v1/chat/completions has it: what it names stands within, not beside its type."""
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        tools = choice.get("tools")
        named = [_as_in_chats(tool) for tool in tools] if isinstance(tools, list) else None
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": named}}
    return choice
