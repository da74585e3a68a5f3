"""Places 3 and 13 of a request with tools: its prompt and grammar by the model's tool protocol, and the calls in its answers."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from serve.limits import Limits
from serve.request import ChatRequest, TextEvent, TextToken, Tool, ToolCallDelta
from serve.structured.grammar_source import GrammarSource, grammar_source_of, schema_text
from serve.structured.schemas import read_schema, with_whitespace
from serve.text.tokenizer import Tokenizer
from serve.tools.hermes import CALL, Hermes
from serve.tools.protocol import CallRules, ProtocolName, Rendered, ToolCallParser, ToolProtocol
from serve.tools.qwen_agent import QwenAgent


def choose_protocol(name: ProtocolName, tokenizer: Tokenizer, template: str | None) -> ToolProtocol:
    """ "auto": Hermes if <tool_call> is in the vocabulary or the chat template, else Qwen-Agent's, which Qwen2 was trained on."""
    if name == "auto":
        name = "hermes" if tokenizer.id_of(CALL) is not None or CALL in (template or "") else "qwen_agent"
    return Hermes() if name == "hermes" else QwenAgent()


class RequestTools:
    """The tools of one request: rendered into the prompt, and as a grammar."""

    def __init__(self, request: ChatRequest, protocol: ToolProtocol, limits: Limits) -> None:
        """``request`` is valid (`serve.validation`)."""
        self._request, self._protocol, self._limits = request, protocol, limits
        wanted = request.options.format
        shown = () if request.tool_choice == "none" else request.offered_tools
        tools = tuple(tool for tool in shown if request.tool_choice != "function" or tool.name == request.tool_name)
        self._rules = CallRules(
            tools=tools,
            shown=shown,
            required=bool(tools) and request.tool_choice != "auto",
            parallel=request.parallel_tool_calls,
            schemas=[_arguments_schema(tool, at, limits) for at, tool in enumerate(tools)],
            answer=schema_text(wanted, limits) if wanted is not None and wanted.is_json else None,
            has_own_grammar=wanted is not None and not wanted.is_json,
        )
        self.rendered: Rendered = protocol.render(request.messages, self._rules)

    @classmethod
    def of(cls, request: ChatRequest, protocol: ToolProtocol, limits: Limits) -> "RequestTools | None":
        """None if neither the request nor its messages have anything to do with tools."""
        has_calls = any(message.role == "tool" or message.tool_calls for message in request.messages)
        return cls(request, protocol, limits) if request.offered_tools or has_calls else None

    @property
    def grammar_source(self) -> GrammarSource:
        """The grammar of the answer: every call is complete and fits its schema, and other text contains no part of a call."""
        wanted = self._request.options.format
        if wanted is not None and self._rules.has_own_grammar:
            return grammar_source_of(wanted, self._limits)
        param = wanted.param if wanted is not None and not self._rules.tools else "tools"
        return GrammarSource("lark", self._protocol.grammar(self._rules, continues=self._continues), param)

    def parser_for(self, choice: int) -> "ChoiceCallParser":
        has_calls = bool(self._rules.tools) or (self._continues and not self._rules.has_own_grammar)
        continues, is_json = self._continues and not self._rules.required, self._rules.answer is not None
        parser = self._protocol.parser(continues=continues, calls_come_first=is_json) if has_calls else None
        return ChoiceCallParser(parser, self._id, choice, only_calls=self._rules.required)

    @property
    def _continues(self) -> bool:
        return bool(self.rendered.prefix)

    @property
    def _id(self) -> str:
        """What the ids of calls are derived from: a request that is sent again under its idempotency key gets the same ids."""
        return self._request.idempotency_key or self._request.request_id


class ChoiceCallParser:
    """Splits the text of one choice into content and calls."""

    def __init__(self, parser: ToolCallParser | None, request_id: str, choice: int, *, only_calls: bool) -> None:
        """``parser`` None: all text is content. ``only_calls``: the grammar allows nothing but calls."""
        self._parser, self._request_id, self._choice, self._only_calls = parser, request_id, choice, only_calls
        self._num_calls = 0
        self._pending_tokens: tuple[TextToken, ...] = ()

    def read(self, event: TextEvent) -> TextEvent | None:
        """The event with its text split into content and calls. None if all text is held back: its tokens then come with a later event."""
        if self._parser is None:
            return event
        pieces = self._parser.push(event.text)
        calls = _join_deltas([self._with_id(piece.call) for piece in pieces if piece.call is not None])
        if (
            event.finish_reason and not self._only_calls and not self._num_calls
        ):  # else what is held back is a marker, cut off at the length limit
            pieces += self._parser.flush()
        content = "".join(piece.content for piece in pieces)
        is_whole = bool(self._num_calls) and not self._parser.in_arguments  # a stop string may end the answer anywhere
        reason = "tool_calls" if event.finish_reason == "stop" and is_whole else event.finish_reason
        self._pending_tokens += event.tokens
        if not content and not calls and reason is None:
            return None
        tokens, self._pending_tokens = self._pending_tokens, ()
        return replace(event, text=content, tool_calls=calls, tokens=tokens, finish_reason=reason)

    def discard_pending(self) -> None:
        """Forget the held-back tokens: the client has them already."""
        self._pending_tokens = ()

    def _with_id(self, call: ToolCallDelta) -> ToolCallDelta:
        """Adds the id to a call's first delta. It depends only on the call's place, so a front that resumes the stream gives the same."""
        if call.name is None:
            return call
        self._num_calls += 1
        digest = hashlib.sha256(f"{self._request_id}/{self._choice}/{call.index}".encode()).hexdigest()
        return ToolCallDelta(index=call.index, id=f"call_{digest[:24]}", name=call.name, arguments=call.arguments)


def _join_deltas(calls: Sequence[ToolCallDelta]) -> tuple[ToolCallDelta, ...]:
    """At most one delta for each call."""
    joined: dict[int, ToolCallDelta] = {}
    for call in calls:
        known = joined.get(call.index)
        joined[call.index] = call if known is None else known.with_more(call.arguments)
    return tuple(joined.values())


def _arguments_schema(tool: Tool, at: int, limits: Limits) -> str:
    return with_whitespace(read_schema(tool.parameters, limits, param=f"tools[{at}].function.parameters"))
