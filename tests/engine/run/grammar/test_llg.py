"""llguidance behind our interface, against a reference that tries every id."""

import random
import resource

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import GrammarFailed
from engine.run.grammar.cache import GrammarCache, counted_bytes
from engine.run.grammar.llg import LlCompiler
from tests.engine.run.grammar.regex_reference import TOKENS, VOCABULARY, SlowGrammar, ids

COMPILER = LlCompiler(VOCABULARY, cache_bytes=1 << 20)
PATTERNS = ["ab*c?", "(ab|abc|b[a-c]+)+", "[0-9]{2,4}(,[0-9]+)*", 'a"?b{3}|true', "x{0,3}(é|ü)y*", "(aa)*b", '\\{"[a-z]+": (true|12)\\}']


def allowed(mask: bytes) -> list[int]:
    return [token for token in range(len(TOKENS)) if mask[token // 8] >> token % 8 & 1]


@settings(max_examples=60, deadline=None)
@given(pattern=st.sampled_from(PATTERNS), seed=st.integers(0, 10_000))
def test_every_mask_allows_what_trying_every_id_allows(pattern, seed):
    draw, fast, slow = random.Random(seed), COMPILER.compile(f"start: /{pattern}/"), SlowGrammar(pattern.encode())
    for _ in range(12):
        mask = fast.mask()
        assert allowed(mask) == allowed(slow.mask())
        assert fast.may_end == slow.may_end
        if not allowed(mask):
            break
        token = draw.choice(allowed(mask))
        assert fast.accept([token]) == slow.accept([token]) == 1


@settings(max_examples=40, deadline=None)
@given(pattern=st.sampled_from(PATTERNS), seed=st.integers(0, 10_000), num_drafts=st.integers(1, 6), num_kept=st.integers(0, 6))
def test_rolled_back_drafts_leave_no_trace(pattern, seed, num_drafts, num_kept):
    draw, drafted, plain = random.Random(seed), COMPILER.compile(f"start: /{pattern}/"), COMPILER.compile(f"start: /{pattern}/")
    drafts = []
    while len(drafts) < num_drafts and (choices := allowed(drafted.mask())):
        drafts.append(draw.choice(choices))
        drafted.accept(drafts[-1:])
    kept = drafts[:num_kept]
    drafted.roll_back(len(drafts) - len(kept))
    plain.accept(kept)
    assert (drafted.mask(), drafted.may_end) == (plain.mask(), plain.may_end)


def test_a_token_that_does_not_fit_is_refused_and_changes_nothing():
    grammar = COMPILER.compile("start: /abc/")
    assert grammar.accept(ids("abx")) == 2
    assert allowed(grammar.mask()) == ids("c")
    assert grammar.accept(ids("c")) == 1
    assert (allowed(grammar.mask()), grammar.may_end) == ([], True)
    assert grammar.accept(ids("c")) == 0


@pytest.mark.parametrize("source", ["start: ANY\nANY: /(.|\\n)*/", 'start: "<|end|>"', 'start: "<|start|>" /.*/'])
def test_the_text_of_a_control_token_is_only_text(source):
    assert not VOCABULARY.special_ids & set(allowed(COMPILER.compile(source).mask()))


@pytest.mark.parametrize(
    "source",
    [
        "no grammar at all",
        "start: other",
        "start: /(/",
        "start: /(?=a)b/",
        'start: %json {"type": "what"}',
        'start: %json {"type": "string", "minLength": 3, "maxLength": 2}',
        'start: %json {"not": {"type": "string"}}',
        'start: %json {"$ref": "http://example.org/schema"}',
    ],
)
def test_what_cannot_be_compiled_is_refused_with_a_one_line_message(source):
    with pytest.raises(GrammarFailed) as refusal:
        COMPILER.compile(source).mask()
    assert 0 < len(str(refusal.value)) <= 300
    assert "\n" not in str(refusal.value)


def test_an_empty_language_allows_no_token():
    grammar = COMPILER.compile("start: a\na: b\nb: a")
    with pytest.raises(GrammarFailed):
        grammar.mask()


def test_equal_sources_share_what_is_compiled_and_nothing_else():
    one, other = COMPILER.compile("start: /ab*/"), COMPILER.compile("start: /ab*/")
    one.accept(ids("abb"))
    assert allowed(other.mask()) == [token for token in allowed(other.mask()) if TOKENS[token].startswith(b"a")]


def test_the_cache_forgets_the_least_recently_used_beyond_its_bytes():
    cache = GrammarCache(3 * counted_bytes("a"))
    for source in "abc":
        cache.put(source, source)
    assert cache.get("a") == "a"
    cache.put("d", "d")
    assert [cache.get(source) for source in "abcd"] == ["a", None, "c", "d"]
    cache.put("x" * 10_000, "too large to be kept")
    assert (len(cache), cache.num_bytes) == (0, 0)


def test_grammars_are_estimated_larger_than_they_are():
    """The bytes by which the process grows for many different schemas, first masks included."""
    properties = [f'"field_{number}": {{"type": "string", "maxLength": {number + 1}}}' for number in range(300)]
    sources = [f'start: %json {{"type": "object", "properties": {{{", ".join(properties[k : k + 12])}}}}}' for k in range(288)]
    compiler = LlCompiler(VOCABULARY, cache_bytes=1 << 30)
    compiler.compile(sources[0]).mask()
    before = _resident_bytes()
    for source in sources:
        compiler.compile(source).mask()
    assert _resident_bytes() - before < sum(map(counted_bytes, sources))


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()
