"""Grammars compiled by llguidance; the only module that uses the library."""

import re
from collections.abc import Sequence
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from engine.errors import GrammarFailed
from engine.run.grammar.cache import GrammarCache
from model.vocabulary import Vocabulary

HEADER = '%llguidance {"no_forcing": true}\n'
"""Forced text is also sampled: the model chooses its tokens, as it does everywhere else."""

LIMITS = llguidance.LLParserLimits(
    max_items_in_row=2_000,
    initial_lexer_fuel=1_000_000,  # about 20 ms
    step_lexer_fuel=200_000,  # about 15 ms
    step_max_items=50_000,  # about 3 ms
    max_lexer_states=50_000,  # 1 to 2 KB each
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""Beyond these limits a grammar fails, so that it cannot stall the rank."""


class LlGrammar:
    """An `engine.grammar.Grammar`."""

    def __init__(self, matcher: llguidance.LLMatcher, end_id: int) -> None:
        self._matcher, self._end_id = matcher, end_id
        self._may_end = False

    def accept(self, tokens: Sequence[int]) -> int:
        return self._matcher.try_consume_tokens(list(tokens))

    def roll_back(self, num_tokens: int) -> None:
        if not self._matcher.rollback(num_tokens):
            raise GrammarFailed(f"{num_tokens} tokens cannot be rolled back")

    def mask(self) -> bytes:
        mask = bytearray(self._matcher.compute_bitmask())
        if self._matcher.is_error():
            raise GrammarFailed(_reason(self._matcher))
        byte, bit = divmod(self._end_id, 8)
        self._may_end = bool(mask[byte] >> bit & 1)
        mask[byte] &= ~(1 << bit) & 0xFF
        return bytes(mask)

    @property
    def may_end(self) -> bool:
        return self._may_end


class LlCompiler:
    """An `engine.grammar.GrammarCompiler`. Creating one takes a second or two for 150,000 ids, and some 80 MB."""

    def __init__(self, vocabulary: Vocabulary, *, cache_bytes: int) -> None:
        """``cache_bytes`` limits the compiled grammars that are kept for later requests.

        Raises:
            ValueError: the vocabulary has no control token that could mean the end.
        """
        if not vocabulary.special_ids:
            raise ValueError("a vocabulary without control tokens has no end of sequence")
        self._end_id = min(vocabulary.special_ids)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Tokens(vocabulary, self._end_id)), n_vocab=len(vocabulary.tokens), eos_token=self._end_id
        )
        self._cache: GrammarCache[llguidance.LLMatcher] = GrammarCache(cache_bytes)

    def compile(self, source: str) -> LlGrammar:
        matcher = self._cache.get(source)
        if matcher is None:
            matcher = llguidance.LLMatcher(self._tokenizer, HEADER + source, log_level=0, limits=LIMITS)
            if matcher.is_error():
                raise GrammarFailed(_reason(matcher))
            self._cache.put(source, matcher)
        return LlGrammar(matcher.deep_copy(), self._end_id)


class _Tokens:
    """A vocabulary in the form that the library wants."""

    def __init__(self, vocabulary: Vocabulary, end_id: int) -> None:
        self.tokens = list(vocabulary.tokens)
        self.special_token_ids = sorted(vocabulary.special_ids)
        self.eos_token_id, self.bos_token_id = end_id, None

    def __call__(self, text: Any) -> list[int]:
        raise NotImplementedError("nothing is forced, so no text is tokenised")


def _reason(matcher: llguidance.LLMatcher) -> str:
    """The first line of the library's message, without the position in its own form of the grammar. Further lines show internals."""
    text = matcher.get_error().strip()
    if text.startswith("panic"):
        return "the grammar cannot be followed"
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("<")]
    return re.sub(r"^at \d+\(\d+\): ", "", lines[0] if lines else matcher.stop_reason()).rstrip(": ")[:300]


def lark_of(kind: str, text: str) -> str:
    """A grammar in the library's Lark from "lark", "ebnf" (Lark, or llama.cpp's GBNF) or "regex".

    Raises:
        GrammarFailed: the text is not a grammar of this kind.
    """
    if kind == "lark":
        return text
    if kind == "regex":
        return f"start: /{llguidance.regex_to_lark(text, 'd')}/" if text else 'start: ""'
    if "%llguidance" in text:
        raise GrammarFailed("%llguidance is not supported")
    try:
        return any_to_lark(text)
    except Exception as error:  # the converter raises many kinds
        raise GrammarFailed(f"the grammar is neither Lark nor GBNF: {error}"[:300]) from error
