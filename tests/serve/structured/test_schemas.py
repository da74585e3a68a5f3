"""Checks of a schema or an expression before anything compiles it: a front does nothing else meanwhile, so they must read it once."""

import json

import pytest

import serve.structured.schemas
from serve.errors import InvalidRequest
from serve.limits import Limits
from serve.structured.schemas import check_regex, read_schema

LONG = Limits().schema_bytes


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", "(?:a*)*", r"(\d+)*", "([a-z]+)+", r"([\]x]*?)*", r"x(\)+)+", "b(.*)+c", "([(]+)*"],
)
def test_a_repeated_repetition_is_found(pattern: str) -> None:
    with pytest.raises(InvalidRequest, match="only a repetition"):
        check_regex(pattern, param="p")


@pytest.mark.parametrize(
    "pattern", ["(ab+)+", "(a+|b)+", "(a+)", r"\(a+\)+", "[(a+)+]", r"[\](a+)+]", "(a)+", "((a+)b)*", "(", "[", "\\", "[\\"]
)
def test_other_expressions_are_left_to_the_compiler(pattern: str) -> None:
    check_regex(pattern, param="p")


@pytest.mark.parametrize("part", ["([", "[", "(", "[\\", "\\", "(?:[", "(a+"])
def test_an_expression_is_read_once_however_long_it_is(part: str) -> None:
    """It took a minute where every "([" was the beginning of another search for the class's end."""
    check_regex(part * (LONG // len(part)), param="p")


def test_every_reference_of_a_long_chain_is_followed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    followed: list[str] = []
    resolved = serve.structured.schemas._resolved

    def counted(reference: str, schema: object) -> object:
        followed.append(reference)
        return resolved(reference, schema)

    monkeypatch.setattr(serve.structured.schemas, "_resolved", counted)
    chain = {f"{at}": {"$ref": f"#/$defs/{at + 1}"} for at in range(200)}
    read_schema(json.dumps({"$defs": chain}), Limits(), param="p")
    assert len(followed) == len(set(followed)) == 200


def test_a_ring_behind_a_chain_that_has_an_end_is_found() -> None:
    parts = {"end": {}, "a": {"$ref": "#/$defs/end"}, "b": {"$ref": "#/$defs/a"}, "c": {"$ref": "#/$defs/d"}, "d": {"$ref": "#/$defs/c"}}
    with pytest.raises(InvalidRequest, match="leads back"):
        read_schema(json.dumps({"$defs": parts}), Limits(), param="p")
