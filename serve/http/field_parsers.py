"""Parsers of OpenAI's fields that come in several shapes. Each returns one shape."""

import re
from typing import Any, LiteralString

from pydantic_core import PydanticCustomError

TOKEN_ID = re.compile(r"0|-?[1-9][0-9]{0,11}")


def shape_error(message: LiteralString) -> PydanticCustomError:
    return PydanticCustomError("wrong_shape", message)


def join_text_parts(content: Any) -> str | None:
    """A message's content: text, or text parts, which are joined with line breaks (as vLLM does)."""
    if isinstance(content, str) or content is None:
        return content
    if not isinstance(content, list):
        raise shape_error("should be text or a list of text parts")
    return "\n".join(_text_of(part) for part in content)


def _text_of(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind not in ("text", "refusal", None):
        raise PydanticCustomError("not_supported", "only text parts are supported: this model takes no images or audio")
    text = None if kind is None else part.get(kind)  # both have their text under the name of their type
    if not isinstance(text, str):
        raise shape_error('a text part should be {"type": "text", "text": "..."}')
    return text


def parse_stop(stop: Any) -> list[str]:
    """One stop string, several, or none."""
    if stop is None:
        return []
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise shape_error("should be a string or a list of strings")
    return strings


def empty_if_none(values: Any) -> Any:
    """null means an empty list."""
    return [] if values is None else values


def parse_logit_bias(bias: Any) -> list[tuple[int, float]]:
    """Token ids to numbers. The keys of a JSON object are strings; these must be token ids in decimal."""
    if bias is None:
        return []
    if not isinstance(bias, dict):
        raise shape_error("should be an object from token ids to numbers")
    if not all(TOKEN_ID.fullmatch(key) for key in bias):
        raise shape_error("its keys should be token ids")
    if not all(type(value) in (int, float) for value in bias.values()):
        raise shape_error("its values should be numbers")
    try:
        return [(int(key), float(value)) for key, value in bias.items()]
    except OverflowError:
        raise shape_error("its values should be numbers") from None


def parse_prompts(prompt: Any) -> list[str | list[int]]:
    """A string, a list of strings, the token ids of one prompt, or a list of such."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if _all_ids(prompt):
            return [prompt]
        if all(isinstance(one, str) for one in prompt) or all(isinstance(one, list) and _all_ids(one) for one in prompt):
            return prompt
    raise shape_error("should be a string, a list of strings, a list of token ids, or a list of such lists, and not empty")


def _all_ids(ids: list[Any]) -> bool:
    return all(type(one) is int for one in ids)
