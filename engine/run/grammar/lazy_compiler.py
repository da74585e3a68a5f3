"""From a checkpoint's vocabulary to a rank that can follow grammars."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from engine.errors import GrammarFailed
from engine.grammar import Grammar, GrammarCompiler
from engine.run.grammar.guides import Guides
from engine.run.settings import RunnerConfig
from model.vocabulary import Vocabulary

AT_REST_S = 1.0
"""A rank that is being loaded or computes steps is not at rest for so long: half a second that Python's lock is held would be theirs."""
REST = 0.3
"""Part of a core that a process takes at most which is said to be at rest."""

log = logging.getLogger(__name__)


def open_guides(folder: Path, vocab_size: int, config: RunnerConfig) -> Guides:
    """``vocab_size`` ids can be sampled. Without a byte-level tokenizer.json grammars are refused, one by one.

    Raises:
        InvalidModelConfig: tokenizer.json is damaged.
    """
    vocabulary = Vocabulary.from_checkpoint(folder)
    if vocabulary is None or not vocabulary.special_ids:
        return Guides(None, vocab_size=vocab_size)
    from engine.run.grammar.llg import LlCompiler  # llguidance, which machines that only measure models need not have

    compiler = LazyCompiler(partial(LlCompiler, vocabulary, cache_bytes=config.grammar_cache_bytes), AT_REST_S)
    return Guides(compiler, vocab_size=vocab_size, special_ids=sorted(vocabulary.special_ids))


class LazyCompiler:
    """A `GrammarCompiler` that is made when this process has been at rest for a while, or for the first grammar if that comes sooner. Where
    it cannot be made every grammar is refused, and nothing else."""

    def __init__(
        self, make: Callable[[], GrammarCompiler], at_rest_s: float, *, computed_s: Callable[[], float] = time.process_time
    ) -> None:
        """``computed_s`` tells how long this process has computed."""
        self._make, self._computed_s = make, computed_s
        self._made: GrammarCompiler | None = None
        self._making = threading.Lock()
        self._fault: str | None = None
        threading.Thread(target=self._make_early, args=(at_rest_s,), name="grammar compiler", daemon=True).start()

    def compile(self, source: str) -> Grammar:
        return self._compiler().compile(source)

    def _make_early(self, at_rest_s: float) -> None:
        took_s = at_rest_s
        while took_s > REST * at_rest_s:
            before_s = self._computed_s()
            time.sleep(at_rest_s)
            took_s = self._computed_s() - before_s
        with suppress(GrammarFailed):  # it is told to whoever brings a grammar
            self._compiler()

    def _compiler(self) -> GrammarCompiler:
        with self._making:
            if self._made is None and self._fault is None:
                began = time.monotonic()
                try:
                    self._made = self._make()
                except BaseException as error:  # a panic of llguidance's is no Exception
                    log.exception("no grammar can be followed with this model's vocabulary")
                    self._fault = f"this model's vocabulary cannot be followed by a grammar: {error}"
                else:
                    log.info("grammars can be compiled, after %.1f s", time.monotonic() - began)
            if self._made is None:
                raise GrammarFailed(self._fault)
            return self._made
