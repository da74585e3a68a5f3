"""Computes which ids each sequence with a grammar may continue with, while the forward pass runs.

The tokens that a step computes are known when it is planned, so a thread computes what may follow them while the model runs. A grammar
that is not compiled in time delays nobody: its sequence gets no token in that step.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from engine.errors import GrammarFailed
from engine.grammar import Grammar, GrammarCompiler
from engine.plan import NewSequence, SampledTokens, Work

COMPILE_WAIT_S = 0.05
"""How long a step waits for grammars that are still being compiled."""
COMPILE_TIMEOUT_S = 20.0
"""A grammar that takes longer fails its request. The fronts refuse grammars that take more than some seconds."""
NO_COMPILER = "this model has no byte-level tokenizer.json, so its answers cannot follow a grammar"


@dataclass(frozen=True, slots=True)
class AllowedTokens:
    """The ids that a sequence may continue with."""

    words: np.ndarray | None = None
    """int32 (W,), a bit for each id, lowest first. None: not known yet, or never if there is a ``fault``."""
    fault: str | None = None


NO_CONSTRAINTS: Mapping[int, AllowedTokens] = MappingProxyType({})


def blocked_results(allowed: Mapping[int, AllowedTokens]) -> dict[int, SampledTokens]:
    """The results, without a token, of sequences whose grammar is not ready or has failed."""
    return {
        number: SampledTokens(number, (), fault=one.fault, is_grammar_fault=one.fault is not None)
        for number, one in allowed.items()
        if one.words is None
    }


class Guide:
    """One sequence's grammar, and how many of its tokens the grammar has consumed."""

    def __init__(self, opening: NewSequence, grammar: Future[Grammar]) -> None:
        self._sampling, self._num_prompt = opening.sampling, opening.num_prompt
        self.grammar = grammar
        self._began = time.monotonic()
        self._num_known = len(opening.history)
        self._unseen = list(opening.history[opening.num_prompt :])

    def add_tokens(self, work: Work) -> None:
        """Record the tokens of a work that are new; tokens of the prompt are not constrained."""
        first = max(self._num_known, self._num_prompt) - work.start
        self._unseen += work.tokens[max(first, 0) :]
        self._num_known = max(self._num_known, work.start + len(work.tokens))

    def allowed(self, ordinary: np.ndarray) -> AllowedTokens:
        """The ids that may follow all recorded tokens. ``ordinary``: bits of the ids that are not control tokens."""
        if not self.grammar.done():
            late = time.monotonic() - self._began > COMPILE_TIMEOUT_S
            return AllowedTokens(fault="the grammar takes too long to compile") if late else AllowedTokens()
        try:
            grammar = self.grammar.result()
            if grammar.accept(self._unseen) < len(self._unseen):
                return AllowedTokens(fault="the tokens so far do not follow the grammar")
            self._unseen.clear()
            return AllowedTokens(words=self._words(grammar, ordinary))
        except GrammarFailed as error:
            return AllowedTokens(fault=str(error))

    def _words(self, grammar: Grammar, ordinary: np.ndarray) -> np.ndarray:
        """If the text may continue *and* may end, `min_tokens` decides; if it can only end, it ends."""
        words: np.ndarray = _padded(grammar.mask(), len(ordinary)) & ordinary
        stops = _bits_of(self._sampling.stop_token_ids, len(ordinary))
        if self._num_known - self._num_prompt < self._sampling.min_tokens and (words & ~stops).any():
            words &= ~stops
        elif grammar.may_end:
            words |= stops & ~ordinary
        return words


class Guides:
    """The guides of all sequences of one rank that have a grammar."""

    def __init__(self, compiler: GrammarCompiler | None, *, vocab_size: int, special_ids: Sequence[int] = ()) -> None:
        self._compiler = compiler
        num_words = -(-vocab_size // 32)
        self._ordinary = ~_bits_of(special_ids, num_words)
        self._open: dict[int, Guide] = {}
        self._masking = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._compiling = ThreadPoolExecutor(2, thread_name_prefix="grammars")

    def open(self, opening: NewSequence) -> None:
        source = opening.sampling.grammar
        if source is not None:
            self._open[opening.sequence] = Guide(opening, self._compiling.submit(self._compile, source))

    def close(self, sequence: int) -> None:
        self._open.pop(sequence, None)

    def add_tokens(self, work: Work) -> None:
        """Record the tokens of a work."""
        if guide := self._open.get(work.sequence):
            guide.add_tokens(work)

    def begin(self, sequences: Sequence[int]) -> "Future[dict[int, AllowedTokens]] | None":
        """Compute in another thread what may follow in those of ``sequences`` that have a grammar. None if none has."""
        guided = [number for number in sequences if number in self._open]
        return self._masking.submit(self._look_up, guided) if guided else None

    def _look_up(self, numbers: list[int]) -> dict[int, AllowedTokens]:
        guides = {number: self._open[number] for number in numbers}
        compiling = [guide.grammar for guide in guides.values() if not guide.grammar.done()]
        if compiling:
            wait(compiling, timeout=COMPILE_WAIT_S)
        return {number: guide.allowed(self._ordinary) for number, guide in guides.items()}

    def _compile(self, source: str) -> Grammar:
        if self._compiler is None:
            raise GrammarFailed(NO_COMPILER)
        return self._compiler.compile(source)

    def __repr__(self) -> str:
        return f"<Guides [{len(self._open)} open]>"


def _padded(mask: bytes, num_words: int) -> np.ndarray:
    """The mask as int32 words; ids beyond it are not allowed."""
    return np.frombuffer(mask[: 4 * num_words].ljust(4 * num_words, b"\0"), np.int32)


def _bits_of(ids: Sequence[int], num_words: int) -> np.ndarray:
    words = np.zeros(num_words, np.uint32)
    for token in ids:
        if token < 32 * num_words:
            words[token // 32] |= np.uint32(1 << token % 32)
    return words.view(np.int32)
