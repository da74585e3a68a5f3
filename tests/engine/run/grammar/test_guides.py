"""The ids that a sequence may continue with, and what happens until they are known."""

import threading
from concurrent.futures import Future

import numpy as np
import pytest

from engine.errors import GrammarFailed
from engine.plan import NewSequence, Work
from engine.request import SamplingParams
from engine.run.grammar import guides as module
from engine.run.grammar.guides import AllowedTokens, Guides
from engine.run.grammar.lazy_compiler import LazyCompiler
from engine.run.grammar.llg import LlCompiler
from tests.engine.run.grammar.regex_reference import END, TOKENS, VOCABULARY, ids

COMPILER = LlCompiler(VOCABULARY, cache_bytes=1 << 20)
PROMPT = tuple(ids("prompt"))


def make_guides(compiler=COMPILER) -> Guides:
    return Guides(compiler, vocab_size=len(TOKENS), special_ids=sorted(VOCABULARY.special_ids))


def opened(guides: Guides, grammar: str, output: str = "", **params: object) -> None:
    sampling = SamplingParams(grammar=grammar, **{"stop_token_ids": (END,)} | params)
    guides.open(NewSequence(7, 0, len(PROMPT), sampling, history=PROMPT + tuple(ids(output))))


def look_up(guides: Guides) -> AllowedTokens:
    pending = guides.begin([7, 8])
    assert pending is not None
    return pending.result()[7]


def texts(allowed: AllowedTokens) -> set[bytes]:
    assert allowed.fault is None
    assert allowed.words is not None
    bits = np.unpackbits(allowed.words.view(np.uint8), bitorder="little")[: len(TOKENS)]
    return {TOKENS[token] for token in np.flatnonzero(bits)}


def test_only_the_output_is_constrained_whatever_tokens_works_repeat():
    guides = make_guides()
    opened(guides, "start: /abc?/")
    for start in (0, 2, 4):
        guides.add_tokens(Work(7, start, PROMPT[start : start + 2], (), start == 4))
    assert texts(look_up(guides)) == {b"a", b"ab", b"abc"}
    guides.add_tokens(Work(7, len(PROMPT), tuple(ids("a")), (), True))
    assert texts(look_up(guides)) == {b"b"}
    assert texts(look_up(guides)) == {b"b"}  # a step that is repeated
    guides.add_tokens(Work(7, len(PROMPT), tuple(ids("a")), (), True))
    guides.add_tokens(Work(7, len(PROMPT) + 1, tuple(ids("b")), (), True))
    assert texts(look_up(guides)) == {b"c", TOKENS[END]}


@pytest.mark.parametrize("output", ["", "a", "ab"])
def test_a_reopened_sequence_continues_where_it_was(output):
    fresh, back = make_guides(), make_guides()
    opened(fresh, "start: /abc*/")
    fresh.add_tokens(Work(7, 0, PROMPT, (), True))
    for at, token in enumerate(ids(output)):
        fresh.add_tokens(Work(7, len(PROMPT) + at, (token,), (), True))
    opened(back, "start: /abc*/", output)
    back.add_tokens(Work(7, 0, (*PROMPT, *ids(output)), (), True))
    assert texts(back_allowed := look_up(back)) == texts(look_up(fresh))
    assert back_allowed.words is not None


def test_min_tokens_forbids_the_end_only_while_another_token_is_allowed():
    guides = make_guides()
    opened(guides, "start: /a*/", min_tokens=2)
    assert TOKENS[END] not in texts(look_up(guides))
    opened(guides, "start: /a*/", "aa", min_tokens=2)
    assert TOKENS[END] in texts(look_up(guides))
    opened(guides, "start: /a/", "a", min_tokens=9)
    assert texts(look_up(guides)) == {TOKENS[END]}


def test_an_ordinary_stop_id_is_allowed_where_the_grammar_allows_it():
    guides = make_guides()
    stop = ids("b")[0]
    opened(guides, "start: /a*b*/", stop_token_ids=(stop, 9_999))
    assert texts(look_up(guides)) >= {b"a", b"b"}
    opened(guides, "start: /a*b*/", stop_token_ids=(stop,), min_tokens=1)
    assert b"b" not in texts(look_up(guides))


@pytest.mark.parametrize("source", ["start: <|start|>", "start: <[1]>"])
def test_a_grammar_that_asks_for_control_tokens_gets_none(source):
    guides = make_guides()
    opened(guides, source)
    assert texts(look_up(guides)) == set()


def test_tokens_that_do_not_follow_the_grammar_are_a_fault():
    guides = make_guides()
    opened(guides, "start: /abc/", "ax")
    assert look_up(guides).fault == "the tokens so far do not follow the grammar"


def test_an_invalid_grammar_and_a_missing_tokenizer_are_faults():
    guides = make_guides()
    opened(guides, "start: /(/")
    assert "regex" in (look_up(guides).fault or "")
    without = make_guides(None)
    opened(without, "start: /a/")
    assert look_up(without).fault == module.NO_COMPILER


class HeldCompiler:
    """A compiler that compiles on command."""

    def __init__(self) -> None:
        self.go, self.began = threading.Event(), Future()

    def compile(self, source: str):
        self.began.set_result(source)
        if not self.go.wait(60):
            raise GrammarFailed("never told")
        return COMPILER.compile(source)


def test_a_grammar_that_is_still_compiling_delays_nobody(monkeypatch):
    monkeypatch.setattr(module, "COMPILE_WAIT_S", 0.0)
    compiler = HeldCompiler()
    guides = make_guides(compiler)
    opened(guides, "start: /a/")
    compiler.began.result(60)
    assert look_up(guides) == AllowedTokens()
    monkeypatch.setattr(module, "COMPILE_TIMEOUT_S", -1.0)
    assert look_up(guides).fault == "the grammar takes too long to compile"
    compiler.go.set()
    monkeypatch.setattr(module, "COMPILE_WAIT_S", 60.0)
    assert texts(look_up(guides)) == {b"a"}


def test_sequences_without_a_grammar_cost_nothing():
    guides = make_guides()
    guides.open(NewSequence(7, 0, 3, SamplingParams()))
    guides.add_tokens(Work(7, 0, (1, 2, 3), (), True))
    assert guides.begin([7]) is None


def test_a_compiler_is_created_once_for_the_first_grammar_or_when_idle() -> None:
    makers: list[threading.Thread] = []
    twice = threading.Event()

    def make() -> LlCompiler:
        makers.append(threading.current_thread())
        if len(makers) > 1:
            twice.set()
        return COMPILER

    guides = make_guides(LazyCompiler(make, 3600))
    assert not makers
    for _ in range(2):
        opened(guides, "start: /abc?/")
        assert texts(look_up(guides)) == {b"a", b"ab", b"abc"}
    assert len(makers) == 1
    LazyCompiler(make, 0.02)
    assert twice.wait(60)
    assert makers[1] is not threading.current_thread()


def test_no_compiler_is_created_while_the_process_is_busy() -> None:
    computed_s = iter((0.0, 1.0, 1.0, 2.0, 2.0, 2.0))
    made = threading.Event()

    def make() -> LlCompiler:
        made.set()
        return COMPILER

    LazyCompiler(make, 0.02, computed_s=lambda: next(computed_s))
    assert made.wait(60)
    assert next(computed_s, None) is None, "two spells in which it computed, and one at rest"


class Panic(BaseException):
    """Like a panic in a Rust library."""


def test_a_compiler_that_cannot_be_created_only_refuses_grammars() -> None:
    attempts: list[None] = []

    def make() -> LlCompiler:
        attempts.append(None)
        raise Panic("too many tokens")

    guides = make_guides(LazyCompiler(make, 3600))
    for _ in range(2):
        opened(guides, "start: /abc?/")
        assert "too many tokens" in (look_up(guides).fault or "")
    assert len(attempts) == 1
