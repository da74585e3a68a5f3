"""Step 1 of a request to /v1/responses: the items of its input become the messages that a chat would have."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serve.errors import InvalidRequest, NotSupported
from serve.request import Message, ToolCall

ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
TEXT_TYPES = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
"""Parts of text, and where each has it."""
PASSED_OVER = frozenset({"reasoning", "web_search_call", "file_search_call", "mcp_list_tools"})
"""What other models thought and looked up on their way to what they said, which stands in messages."""
STORED = frozenset({"item_reference", "compaction", "compaction_trigger"})
OTHERS = "messages, function_call and function_call_output are taken here (reasoning is passed over)"


@dataclass(kw_only=True)
class Turn:
    """A message to which items may still add. What they say is put together once, at the end: there may be megabytes of it."""

    place: str
    """Where the client began it."""
    role: str
    said: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    called_at: list[str] = field(default_factory=list)
    """Where the client said each call."""
    answers: str | None = None
    """The id of the call of which it tells the result."""

    def message(self) -> Message:
        content = "\n".join(filter(None, self.said))
        return Message(role=self.role, content=content, tool_calls=tuple(self.calls), tool_call_id=self.answers)


@dataclass(kw_only=True)
class Conversation:
    """What was said, by whom, and where the client said it."""

    turns: list[Turn] = field(default_factory=list)

    @property
    def messages(self) -> tuple[Message, ...]:
        return tuple(turn.message() for turn in self.turns)

    @property
    def places(self) -> dict[str, str]:
        """Where the client said what a chat calls so.

        {"messages[0]": "instructions", "messages[1]": "input[0]", "messages[1].tool_calls[0]": "input[1]"}
        """
        places = {f"messages[{at}]": turn.place for at, turn in enumerate(self.turns)}
        for at, turn in enumerate(self.turns):
            places |= {f"messages[{at}].tool_calls[{number}]": place for number, place in enumerate(turn.called_at)}
        return places

    def say(self, place: str, role: str, text: str) -> None:
        """What is said beside calls that have no result yet is of one turn with them."""
        if role == "assistant" and self.turns and self.turns[-1].calls:
            self.turns[-1].said.append(text)
        else:
            self.turns.append(Turn(place=place, role=role, said=[text]))

    def call(self, place: str, call: ToolCall) -> None:
        """A call is of one turn with what was said before it, and with calls before it."""
        if not self.turns or self.turns[-1].role != "assistant":
            self.turns.append(Turn(place=place, role="assistant"))
        self.turns[-1].calls.append(call)
        self.turns[-1].called_at.append(place)

    def answer(self, place: str, call_id: str, text: str) -> None:
        self.turns.append(Turn(place=place, role="tool", said=[text], answers=call_id))


def conversation_of(instructions: str | None, given: Any) -> Conversation:
    """
    Raises:
        InvalidRequest: an item has no such shape.
        NotSupported: it is not offered.
    """
    conversation = Conversation()
    if instructions is not None:
        conversation.say("instructions", "system", instructions)
    if isinstance(given, str):
        conversation.say("input", "user", given)
    elif isinstance(given, list):
        for at, item in enumerate(given):
            _take(item, f"input[{at}]", conversation)
    else:
        raise InvalidRequest("input should be text or a list of items", param="input")
    return conversation


def passed_over(given: Any) -> set[str]:
    """Types of items that have no effect."""
    kinds = {_kind_of(item) for item in given if isinstance(item, dict)} if isinstance(given, list) else set()
    return kinds & PASSED_OVER


def _take(item: Any, place: str, conversation: Conversation) -> None:
    if not isinstance(item, dict):
        raise InvalidRequest(f"{place} should be an item: {OTHERS}", param=place)
    kind = _kind_of(item)
    if kind == "message":
        conversation.say(place, _role(item, place), _text(item.get("content"), f"{place}.content"))
    elif kind == "function_call":
        call_id, name, arguments = (_string(item, key, place) for key in ("call_id", "name", "arguments"))
        conversation.call(place, ToolCall(id=call_id, name=name, arguments=arguments))
    elif kind == "function_call_output":
        text = _text(item.get("output"), f"{place}.output")
        conversation.answer(place, _string(item, "call_id", place), text)
    elif kind in STORED:
        raise NotSupported(f"{place}: nothing is stored here that it could stand for; send the items themselves", param=place)
    elif kind not in PASSED_OVER:
        raise NotSupported(f"{place}.type is not offered: {OTHERS}", param=f"{place}.type")


def _kind_of(item: Mapping[str, Any]) -> str:
    """A type may be left out: of a message, and of a reference, which then has an id and nothing else."""
    kind = item.get("type")
    if kind is None:
        return "item_reference" if item.keys() <= {"id", "type"} and "id" in item else "message"
    return kind if isinstance(kind, str) else ""


def _role(item: Mapping[str, Any], place: str) -> str:
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequest(f"{place}.role should be user, assistant, system or developer", param=f"{place}.role")
    return ROLES[role]


def _string(item: Mapping[str, Any], key: str, place: str) -> str:
    said = item.get(key)
    if not isinstance(said, str):
        raise InvalidRequest(f"{place}.{key} should be text", param=f"{place}.{key}")
    return said


def _text(content: Any, place: str) -> str:
    """Text, or parts of text, which are joined with line ends, as a chat's are."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{place} should be text or a list of parts of text", param=place)
    return "\n".join(_text_of(part, f"{place}[{at}]") for at, part in enumerate(content))


def _text_of(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise InvalidRequest(f"{place} should be a part with a type and a text", param=place)
    if kind not in TEXT_TYPES:
        raise NotSupported(f"{place} should be text: this model sees no images, hears nothing and reads no files", param=place)
    return _string(part, TEXT_TYPES[kind], place)
