"""Step 3 of a request: the tools of a request, by the protocol of its model."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from serve.limits import Limits
from serve.request import ChatRequest, TextEvent, TextToken, Tool, ToolCallDelta
from serve.structured.grammar_source import Draft, json_text
from serve.structured.schemas import read_schema, with_whitespace
from serve.text.tokenizer import Tokenizer
from serve.tools.hermes import CALL, Hermes
from serve.tools.protocol import Calls, ProtocolName, Reader, Rendered, ToolProtocol
from serve.tools.qwen_agent import QwenAgent


def protocol_of(name: ProtocolName, tokenizer: Tokenizer, template: str | None) -> ToolProtocol:
    """ "auto": Hermes where the vocabulary or the chat template knows <tool_call>, else Qwen-Agent's, which Qwen2 was trained on."""
    if name == "auto":
        name = "hermes" if tokenizer.id_of(CALL) is not None or CALL in (template or "") else "qwen_agent"
    return Hermes() if name == "hermes" else QwenAgent()


class Toolbox:
    """What one request's tools come to."""

    def __init__(self, request: ChatRequest, protocol: ToolProtocol, limits: Limits) -> None:
        """The request has been validated."""
        self._request, self._protocol = request, protocol
        wanted = request.options.format
        told = () if request.tool_choice == "none" else request.offered_tools
        tools = tuple(tool for tool in told if request.tool_choice != "function" or tool.name == request.tool_name)
        self._calls = Calls(
            tools=tools,
            told=told,
            must=bool(tools) and request.tool_choice != "auto",
            parallel=request.parallel_tool_calls,
            schemas=[_arguments_schema(tool, at, limits) for at, tool in enumerate(tools)],
            answer=None if wanted is None else json_text(wanted, limits),
        )
        self.rendered: Rendered = protocol.render(request.messages, self._calls)

    @classmethod
    def of(cls, request: ChatRequest, protocol: ToolProtocol, limits: Limits) -> "Toolbox | None":
        """None where a request has nothing to do with tools."""
        spoken = any(message.role == "tool" or message.tool_calls for message in request.messages)
        return cls(request, protocol, limits) if request.offered_tools or spoken else None

    @property
    def draft(self) -> Draft:
        """The grammar of the answer: calls are whole and fit their schemas, and what is no call is no half of one."""
        wanted = self._request.options.format
        param = wanted.param if wanted is not None and not self._calls.tools else "tools"
        return Draft("lark", self._protocol.grammar(self._calls, continues=self._continues), param)

    def reading(self, choice: int) -> "Reading":
        reads = bool(self._calls.tools) or self._continues
        reader = self._protocol.reader(continues=self._continues and not self._calls.must) if reads else None
        return Reading(reader, self._id, choice, only_calls=self._calls.must)

    @property
    def _continues(self) -> bool:
        return bool(self.rendered.prefix)

    @property
    def _id(self) -> str:
        """What the ids of calls are made of: a request that is sent again under its key gives the same."""
        return self._request.idempotency_key or self._request.request_id


class Reading:
    """One choice's text as content and calls."""

    def __init__(self, reader: Reader | None, request_id: str, choice: int, *, only_calls: bool) -> None:
        """``only_calls``: the grammar lets nothing but calls come."""
        self._reader, self._request_id, self._choice, self._only_calls = reader, request_id, choice, only_calls
        self._num_calls = 0
        self._untold: tuple[TextToken, ...] = ()

    def read(self, event: TextEvent) -> TextEvent | None:
        """The event with its text told apart; None if there is nothing to tell yet. Its tokens then come with the next one."""
        if self._reader is None:
            return event
        pieces = self._reader.push(event.text)
        calls = _joined([self._named(piece.call) for piece in pieces if piece.call is not None])
        if event.finish_reason and not self._only_calls and not self._num_calls:  # else what is held is a mark cut at its length
            pieces += self._reader.flush()
        content = "".join(piece.content for piece in pieces)
        reason = "tool_calls" if event.finish_reason == "stop" and self._num_calls else event.finish_reason
        self._untold += event.tokens
        if not content and not calls and reason is None:
            return None
        tokens, self._untold = self._untold, ()
        return replace(event, text=content, tool_calls=calls, tokens=tokens, finish_reason=reason)

    def leave_untold(self) -> None:
        """Whoever reads has the tokens whose text is held back."""
        self._untold = ()

    def _named(self, call: ToolCallDelta) -> ToolCallDelta:
        """A call's id is a function of its place: whoever resumes a stream gives the same."""
        if call.name is None:
            return call
        self._num_calls += 1
        digest = hashlib.sha256(f"{self._request_id}/{self._choice}/{call.index}".encode()).hexdigest()
        return ToolCallDelta(index=call.index, id=f"call_{digest[:24]}", name=call.name, arguments=call.arguments)


def _joined(calls: Sequence[ToolCallDelta]) -> tuple[ToolCallDelta, ...]:
    """At most one piece for each call."""
    joined: dict[int, ToolCallDelta] = {}
    for call in calls:
        known = joined.get(call.index)
        joined[call.index] = call if known is None else known.with_more(call.arguments)
    return tuple(joined.values())


def _arguments_schema(tool: Tool, at: int, limits: Limits) -> str:
    return with_whitespace(read_schema(tool.parameters, limits, param=f"tools[{at}].function.parameters"))
