"""Step 1 of a request to /v1/responses, where it is refused: the service judges a chat, and the client hears of its own fields."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from serve.errors import ServeError

MESSAGE = re.compile(r"messages\[(\d+)\]")
WORDS = (
    (re.compile(r"message of role tool"), "function_call_output"),
    (re.compile(r"messages of role tool"), "function_call_output"),
    (re.compile(r"\bmessages\b"), "input"),
    (re.compile(r"\.tool_call_id\b"), ".call_id"),
    (re.compile(r"\.tool_calls\b"), ""),
    (re.compile(r"(tools\[\d+\])\.function\b"), r"\1"),
    (re.compile(r"\btool_choice\.allowed_tools\b"), "tool_choice"),
    (re.compile(r"\bmax_tokens\b"), "max_output_tokens"),
)
"""What a chat calls it, and what this API does."""


@contextmanager
def spelled_for(places: Sequence[str]) -> Iterator[None]:
    """What is raised within names fields as this API does. ``places``: where the client said each message."""
    try:
        yield
    except ServeError as error:
        error.message = spelled(error.message, places)
        error.args = (error.message,)
        error.param = None if error.param is None else spelled(error.param, places)
        raise


def spelled(text: str, places: Sequence[str]) -> str:
    """
    places=("instructions", "input[0]"):  "messages[1].content must be text"  ->  "input[0].content must be text"
    """
    text = MESSAGE.sub(lambda found: places[int(found[1])] if int(found[1]) < len(places) else "input", text)
    for word, own in WORDS:
        text = word.sub(own, text)
    return text
