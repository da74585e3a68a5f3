"""Place 3 of a request: from the response format that a client wants to the source of a grammar."""

import json
from dataclasses import dataclass

from serve.errors import InvalidRequest
from serve.limits import Limits
from serve.request import ResponseFormat
from serve.structured.compiler import GrammarCompiler
from serve.structured.schemas import check_regex, read_schema, with_whitespace

ANY_OBJECT = with_whitespace({"type": "object"})


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """A grammar that has not been compiled."""

    kind: str
    """See `engine.run.grammar.llg.lark_of`."""
    text: str
    param: str
    """The client's field, for errors."""


def grammar_source_of(wanted: ResponseFormat, limits: Limits) -> GrammarSource:
    """The grammar of a response format, for the compiler.

    Raises:
        InvalidRequest: it is invalid, as far as can be seen without compiling.
    """
    if wanted.is_json:
        return GrammarSource("lark", f"start: %json {schema_text(wanted, limits)}", wanted.param)
    if wanted.kind == "choice":
        if not 1 <= len(wanted.choices) <= limits.guided_choices or not all(wanted.choices):
            message = f"{wanted.param} must have 1 to {limits.guided_choices} strings, none of them empty"
            raise InvalidRequest(message, param=wanted.param)
        _check_size("".join(wanted.choices), wanted.param, limits)
        return GrammarSource("lark", "start: " + " | ".join(map(lark_literal, wanted.choices)), wanted.param)
    _check_size(wanted.text, wanted.param, limits)
    if wanted.kind == "regex":
        check_regex(wanted.text, param=wanted.param)
        return GrammarSource("regex", wanted.text, wanted.param)
    return GrammarSource("ebnf", wanted.text, wanted.param)


def schema_text(wanted: ResponseFormat, limits: Limits) -> str:
    """The JSON schema of a JSON format, as text for the compiler."""
    if wanted.kind == "json_object":
        return ANY_OBJECT
    return with_whitespace(read_schema(wanted.text, limits, param=wanted.param))


def lark_literal(text: str) -> str:
    """A string literal of Lark."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("a string holds half a surrogate pair, which is not text") from None
    return json.dumps(text, ensure_ascii=False)


async def compile_grammar(source: GrammarSource, compiler: GrammarCompiler) -> str:
    """The value for `SamplingParams.grammar`.

    Raises:
        InvalidRequest: it is wrong, or takes too much time or memory to compile.
    """
    result = await compiler.compile(source.kind, source.text)
    if result.grammar is None:
        raise InvalidRequest(f"{source.param}: {result.error}", param=source.param)
    return result.grammar


def _check_size(text: str, param: str, limits: Limits) -> None:
    if not 1 <= len(text.encode(errors="replace")) <= limits.schema_bytes:
        raise InvalidRequest(f"{param} must have 1 to {limits.schema_bytes} bytes", param=param)
