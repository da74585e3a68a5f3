"""What a client may not ask for: refused by name, and whoever comes next is served."""

import asyncio
import json
from typing import Any

import psutil
import pytest

from serve.errors import InvalidRequest
from serve.limits import Limits
from serve.request import ResponseFormat
from serve.service import Service
from serve.structured.compiler import CompilerBroken, GrammarCompilerPool
from serve.structured.grammar_source import grammar_source_of
from tests.serve.structured.test_answers import asked, json_form

GOOD = ResponseFormat(kind="choice", choices=("fine",))
MANY = {"type": "object", "properties": {f"p{number}": {} for number in range(4_500)}}
assert len(json.dumps(MANY)) < Limits().schema_bytes


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "boolean"}
    for _ in range(levels - 1):
        schema = {"not_a_word": schema}
    return schema


BAD = {
    "ten thousand properties": json_form({"type": "object", "properties": {f"p{number}": {"type": "integer"} for number in range(10_000)}}),
    "as many properties as fit": json_form(MANY),
    "a reference to itself": json_form({"$ref": "#"}),
    "references in a ring": json_form({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
    "a ring below": json_form({"type": "object", "properties": {"x": {"$ref": "#/properties/x"}}, "required": ["x"]}),
    "a reference elsewhere": json_form({"$ref": "https://example.org/schema.json"}),
    "too deep": json_form(deep(33)),
    "too long": ResponseFormat(kind="json_schema", text=json.dumps({"const": "x" * Limits().schema_bytes})),
    "no JSON": ResponseFormat(kind="json_schema", text="{"),
    "no schema": ResponseFormat(kind="json_schema", text="[1]"),
    "an unknown type": json_form({"type": "what"}),
    "a word that is not known": json_form({"not": {"type": "string"}}),
    "nothing fits": json_form({"type": "string", "minLength": 3, "maxLength": 1}),
    "nothing fits at all": ResponseFormat(kind="json_schema", text="false"),
    "the compiler's own options": json_form({"type": "object", "x-guidance": {"lenient": True}}),
    "an expression that is none": ResponseFormat(kind="regex", text="("),
    "a repeated repetition": ResponseFormat(kind="regex", text="(a+)+$"),
    "a repeated repetition in a schema": json_form({"type": "string", "pattern": "^(?:[a-z]*)*$"}),
    "looking ahead": ResponseFormat(kind="regex", text="(?=a)b"),
    "an empty expression": ResponseFormat(kind="regex", text=""),
    "no choices": ResponseFormat(kind="choice"),
    "an empty choice": ResponseFormat(kind="choice", choices=("a", "")),
    "no grammar": ResponseFormat(kind="grammar", text="what is this"),
    "rules without an end": ResponseFormat(kind="grammar", text="start: a\na: b\nb: a"),
    "a grammar with options": ResponseFormat(kind="grammar", text='%llguidance {"no_forcing": false}\nstart: "a"'),
    "half a character": ResponseFormat(kind="choice", choices=("\ud800",)),
}


@pytest.mark.parametrize("form", BAD.values(), ids=BAD)
async def test_what_cannot_be_is_refused_and_the_next_is_answered(random_service: Service, form: ResponseFormat) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        await random_service.collect(asked(form))
    assert len(refusal.value.message) < 500
    assert "\n" not in refusal.value.message
    assert (await random_service.collect(asked(GOOD))).choices[0].text == "fine"


@pytest.fixture(scope="module")
def compiler(random_folder):
    compiler = GrammarCompilerPool(random_folder, Limits(grammar_cache_bytes=2_000_000, grammar_compile_s=0.3), num_processes=1)
    yield compiler
    compiler.close()


@pytest.mark.parametrize("depth", [31, 32])
async def test_a_schema_may_be_as_deep_as_the_limit(compiler: GrammarCompilerPool, depth: int) -> None:
    schema: dict[str, Any] = {"enum": [1]}
    for _ in range((depth - 2) // 2):
        schema = {"type": "object", "properties": {"x": schema}, "additionalProperties": False}
    grammar_source_of(json_form(schema), Limits())


async def test_a_service_can_have_its_compiler_ready_before_anybody_asks(random_service: Service) -> None:
    compiler = random_service._compiler
    assert isinstance(compiler, GrammarCompilerPool)
    await random_service.warm_up()
    (pid, *_) = compiler.pids
    await compiler.compile("lark", 'start: "b"')
    assert pid in compiler.pids


async def test_one_that_does_not_start_hinders_nobody(random_service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken() -> None:
        raise CompilerBroken("no")

    monkeypatch.setattr(random_service._compiler, "warm_up", broken)
    await random_service.warm_up()


async def test_a_compile_without_end_is_ended_with_its_process_and_remembered(compiler: GrammarCompilerPool) -> None:
    await compiler.warm_up()
    (first,) = compiler.pids
    hostile = ("lark", f"start: %json {json.dumps(MANY)}")
    assert "takes more than" in ((await compiler.compile(*hostile)).error or "")
    assert not psutil.pid_exists(first)
    assert "takes more than" in ((await compiler.compile(*hostile)).error or "")
    assert compiler.pids == ()  # nobody was asked again
    assert (await compiler.compile("regex", "a+")).grammar is not None


@pytest.mark.slow
async def test_memory_without_end_ends_the_process_too(random_folder) -> None:
    compiler = GrammarCompilerPool(random_folder, Limits(grammar_memory_bytes=1 << 20, grammar_compile_s=30.0))
    try:
        large = json.dumps({"enum": [f"text number {number} of many" for number in range(60_000)]})
        assert (await compiler.compile("lark", f"start: %json {large}")).error
    finally:
        compiler.close()


async def test_a_compiler_that_was_killed_is_replaced(compiler: GrammarCompilerPool) -> None:
    await compiler.warm_up()
    (pid,) = compiler.pids
    psutil.Process(pid).kill()
    psutil.Process(pid).wait(20)
    assert (await compiler.compile("regex", "d+")).grammar


async def test_a_grammar_is_not_blamed_for_the_end_of_a_compiler_that_was_killed(compiler: GrammarCompilerPool) -> None:
    await compiler.warm_up()
    (pid,) = compiler.pids
    psutil.Process(pid).suspend()  # so that it is killed while it works
    asked = asyncio.create_task(compiler.compile("regex", "e+"))
    await asyncio.sleep(0.1)
    psutil.Process(pid).kill()
    with pytest.raises(CompilerBroken, match="killed"):
        await asked
    assert (await compiler.compile("regex", "e+")).grammar


async def test_results_are_kept_within_their_bytes(compiler: GrammarCompilerPool) -> None:
    for number in range(12):
        await compiler.compile("regex", f"a{{{number}}}" + "b" * 150_000)
    assert 0 < compiler._result_bytes <= 2_000_000


async def test_no_process_is_left_when_the_compilers_are_closed(compiler: GrammarCompilerPool) -> None:
    await compiler.warm_up()
    (pid,) = compiler.pids
    compiler.close()
    assert not psutil.pid_exists(pid)
