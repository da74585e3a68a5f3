"""Place 1 of a request to /v1/responses: the items of its input become the messages of a chat."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serve.errors import InvalidRequest, NotSupported
from serve.request import Message, ToolCall

ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
TEXT_TYPES = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
"""Types of text parts, and the field that holds the text."""
IGNORED_ITEMS = frozenset({"reasoning", "web_search_call", "file_search_call", "mcp_list_tools"})
"""What other models thought and looked up. What came of it is in messages, so these items can be left out."""
STORED = frozenset({"item_reference", "compaction", "compaction_trigger"})
ACCEPTED = "messages, function_call and function_call_output are accepted (reasoning is ignored)"


@dataclass(kw_only=True)
class Turn:
    """A message that later items may still extend. Its texts are joined once, at the end: there may be megabytes of them."""

    place: str
    """The path of the item that began it."""
    role: str
    texts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    called_at: list[str] = field(default_factory=list)
    """The path of each call's item."""
    answers: str | None = None
    """In a tool's message: the id of the call that it answers."""

    def message(self) -> Message:
        content = "\n".join(filter(None, self.texts))
        return Message(role=self.role, content=content, tool_calls=tuple(self.calls), tool_call_id=self.answers)


@dataclass(kw_only=True)
class Conversation:
    """The turns of a conversation, and where each comes from in the request."""

    turns: list[Turn] = field(default_factory=list)

    @property
    def messages(self) -> tuple[Message, ...]:
        return tuple(turn.message() for turn in self.turns)

    @property
    def places(self) -> dict[str, str]:
        """The path in this request of what a chat request has at a path.

        {"messages[0]": "instructions", "messages[1]": "input[0]", "messages[1].tool_calls[0]": "input[1]"}
        """
        places = {f"messages[{at}]": turn.place for at, turn in enumerate(self.turns)}
        for at, turn in enumerate(self.turns):
            places |= {f"messages[{at}].tool_calls[{number}]": place for number, place in enumerate(turn.called_at)}
        return places

    def say(self, place: str, role: str, text: str) -> None:
        """Assistant text that follows calls without results belongs to the turn of these calls."""
        if role == "assistant" and self.turns and self.turns[-1].calls:
            self.turns[-1].texts.append(text)
        else:
            self.turns.append(Turn(place=place, role=role, texts=[text]))

    def call(self, place: str, call: ToolCall) -> None:
        """A call belongs to the turn of the assistant text, or the calls, before it."""
        if not self.turns or self.turns[-1].role != "assistant":
            self.turns.append(Turn(place=place, role="assistant"))
        self.turns[-1].calls.append(call)
        self.turns[-1].called_at.append(place)

    def answer(self, place: str, call_id: str, text: str) -> None:
        self.turns.append(Turn(place=place, role="tool", texts=[text], answers=call_id))


def conversation_of(instructions: str | None, given: Any) -> Conversation:
    """The conversation that the instructions and the input items of a request make up.

    Raises:
        InvalidRequest: an item is malformed.
        NotSupported: an item is of a kind that is not supported.
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
        raise InvalidRequest("input must be text or a list of items", param="input")
    return conversation


def ignored_items(given: Any) -> set[str]:
    """The types of the items that have no effect."""
    kinds = {_kind_of(item) for item in given if isinstance(item, dict)} if isinstance(given, list) else set()
    return kinds & IGNORED_ITEMS


def _take(item: Any, place: str, conversation: Conversation) -> None:
    if not isinstance(item, dict):
        raise InvalidRequest(f"{place} must be an item: {ACCEPTED}", param=place)
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
        raise NotSupported(f"{place} refers to stored items, and nothing is stored here; send the items themselves", param=place)
    elif kind not in IGNORED_ITEMS:
        raise NotSupported(f"{place}.type is not supported: {ACCEPTED}", param=f"{place}.type")


def _kind_of(item: Mapping[str, Any]) -> str:
    """A message may leave its type out, and so may a reference, which then has only an id."""
    kind = item.get("type")
    if kind is None:
        return "item_reference" if item.keys() <= {"id", "type"} and "id" in item else "message"
    return kind if isinstance(kind, str) else ""


def _role(item: Mapping[str, Any], place: str) -> str:
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequest(f"{place}.role must be user, assistant, system or developer", param=f"{place}.role")
    return ROLES[role]


def _string(item: Mapping[str, Any], key: str, place: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise InvalidRequest(f"{place}.{key} must be text", param=f"{place}.{key}")
    return value


def _text(content: Any, place: str) -> str:
    """Text, or text parts, which are joined with line breaks as in a chat."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{place} must be text or a list of text parts", param=place)
    return "\n".join(_text_of(part, f"{place}[{at}]") for at, part in enumerate(content))


def _text_of(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise InvalidRequest(f"{place} must be a part with a type and a text", param=place)
    if kind not in TEXT_TYPES:
        raise NotSupported(f"{place} must be text: this model takes no images, audio or files", param=place)
    return _string(part, TEXT_TYPES[kind], place)
