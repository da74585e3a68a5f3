"""Names the fields of /v1/responses in errors, which the service raises in terms of a chat request."""

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
"""What a chat request calls it, and what this API does; applied in order."""


@contextmanager
def translate_errors(body: ResponsesBody, conversation: Conversation) -> Iterator[None]:
    """Errors raised inside name fields as this API does."""
    try:
        yield
    except ServeError as error:
        places = conversation.places | {f"tools[{at}]": f"tools[{index}]" for at, index in enumerate(body.functions)}
        error.message = translate(error.message, places)
        error.args = (error.message,)
        error.param = None if error.param is None else translate(error.param, places)
        raise


def translate(text: str, places: Mapping[str, str]) -> str:
    """``places``: paths in this request by paths in the chat; see `Conversation.places`.

    {"messages[1]": "input[0]"}:  "messages[1].content must be text"  ->  "input[0].content must be text"
    """
    text = PLACE.sub(lambda found: places.get(found[0]) or places.get(found[1], found[1]), text)
    for word, own in WORDS:
        text = word.sub(own, text)
    return text
