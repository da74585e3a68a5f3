"""Step 3 of a request: the form that a client wants of an answer, as the draft of a grammar."""

import json
from dataclasses import dataclass

from serve.errors import InvalidRequest
from serve.limits import Limits
from serve.request import ResponseFormat
from serve.structured.compiler import Compiles
from serve.structured.schemas import check_regex, read_schema, with_whitespace

ANY_OBJECT = with_whitespace({"type": "object"})


@dataclass(frozen=True, slots=True)
class Draft:
    """Not compiled yet."""

    kind: str
    """See `engine.run.grammar.llg.lark_of`."""
    text: str
    param: str
    """The client's field, for a refusal."""


def draft_of(wanted: ResponseFormat, limits: Limits) -> Draft:
    """
    Raises:
        InvalidRequest: it can be seen without compiling that it will not do.
    """
    if wanted.kind in ("json_object", "json_schema"):
        return Draft("lark", f"start: %json {json_text(wanted, limits)}", wanted.param)
    if wanted.kind == "choice":
        if not 1 <= len(wanted.choices) <= limits.guided_choices or not all(wanted.choices):
            message = f"{wanted.param} must have 1 to {limits.guided_choices} texts, none of them empty"
            raise InvalidRequest(message, param=wanted.param)
        _check_size("".join(wanted.choices), wanted.param, limits)
        return Draft("lark", "start: " + " | ".join(map(literal, wanted.choices)), wanted.param)
    _check_size(wanted.text, wanted.param, limits)
    if wanted.kind == "regex":
        check_regex(wanted.text, param=wanted.param)
        return Draft("regex", wanted.text, wanted.param)
    return Draft("ebnf", wanted.text, wanted.param)


def json_text(wanted: ResponseFormat, limits: Limits) -> str:
    """The schema of a JSON format, as the compiler takes it."""
    if wanted.kind == "json_object":
        return ANY_OBJECT
    return with_whitespace(read_schema(wanted.text, limits, param=wanted.param))


def literal(text: str) -> str:
    """A text as Lark writes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("a text holds half a surrogate pair, which is no text") from None
    return json.dumps(text, ensure_ascii=False)


async def compiled(draft: Draft, compilers: Compiles) -> str:
    """For `SamplingParams.grammar`.

    Raises:
        InvalidRequest: it is wrong, or takes too much to be compiled.
    """
    verdict = await compilers.compile(draft.kind, draft.text)
    if verdict.grammar is None:
        raise InvalidRequest(f"{draft.param}: {verdict.error}", param=draft.param)
    return verdict.grammar


def _check_size(text: str, param: str, limits: Limits) -> None:
    if not 1 <= len(text.encode(errors="replace")) <= limits.schema_bytes:
        raise InvalidRequest(f"{param} must have 1 to {limits.schema_bytes} bytes", param=param)
