"""Step 1 of a request to /v1/responses, where it is refused: the service judges a chat, and the client hears of its own fields."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from serve.errors import ServeError
from serve.http.responses.items import Conversation
from serve.http.responses.schema import ResponsesBody

PLACE = re.compile(r"((?:messages|tools)\[\d+\])(\.tool_calls\[\d+\])?")
WORDS = (
    (re.compile(r"message of role tool"), "function_call_output"),
    (re.compile(r"messages of role tool"), "function_call_output"),
    (re.compile(r"\bmessages\b(\[\d+\])?"), "input"),
    (re.compile(r"\.tool_call_id\b"), ".call_id"),
    (re.compile(r"\.tool_calls\b"), ""),
    (re.compile(r"(tools\[\d+\])\.function\b"), r"\1"),
    (re.compile(r"\btool_choice\.allowed_tools\b"), "tool_choice"),
    (re.compile(r"\bmax_tokens\b"), "max_output_tokens"),
)
"""What a chat calls it, and what this API does."""


@contextmanager
def spelled_for(body: ResponsesBody, conversation: Conversation) -> Iterator[None]:
    """What is raised within names fields as this API does."""
    try:
        yield
    except ServeError as error:
        places = conversation.places | {f"tools[{at}]": f"tools[{said}]" for at, said in enumerate(body.functions)}
        error.message = spelled(error.message, places)
        error.args = (error.message,)
        error.param = None if error.param is None else spelled(error.param, places)
        raise


def spelled(text: str, places: Mapping[str, str]) -> str:
    """``places``: those of a `Conversation`, and of tools.

    {"messages[1]": "input[0]"}:  "messages[1].content must be text"  ->  "input[0].content must be text"
    """
    text = PLACE.sub(lambda found: places.get(found[0]) or places.get(found[1], found[1]), text)
    for word, own in WORDS:
        text = word.sub(own, text)
    return text
