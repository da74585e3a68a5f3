"""Creates the grammar compiler of a rank from a checkpoint's vocabulary, when the rank has time for it."""

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

IDLE_S = 1.0
"""The rank must be idle for this long. A rank that is loading or computing never is, and creating the compiler would hold Python's lock
for half a second of its time."""
MAX_IDLE_LOAD = 0.3
"""An idle process uses at most this fraction of a core."""

logger = logging.getLogger(__name__)


def open_guides(folder: Path, vocab_size: int, config: RunnerConfig) -> Guides:
    """``vocab_size`` ids can be sampled. Without a byte-level tokenizer.json every request with a grammar is refused.

    Raises:
        InvalidModelConfig: tokenizer.json is damaged.
    """
    vocabulary = Vocabulary.from_checkpoint(folder)
    if vocabulary is None or not vocabulary.special_ids:
        return Guides(None, vocab_size=vocab_size)
    from engine.run.grammar.llg import LlCompiler  # llguidance, which is optional on machines that only measure models

    compiler = LazyCompiler(partial(LlCompiler, vocabulary, cache_bytes=config.grammar_cache_bytes), IDLE_S)
    return Guides(compiler, vocab_size=vocab_size, special_ids=sorted(vocabulary.special_ids))


class LazyCompiler:
    """A `GrammarCompiler` that is created once this process has been idle for a while, or when the first grammar arrives.

    If it cannot be created, requests with a grammar are refused and all others are served.
    """

    def __init__(self, make: Callable[[], GrammarCompiler], idle_s: float, *, computed_s: Callable[[], float] = time.process_time) -> None:
        """``computed_s`` returns the CPU time of this process so far."""
        self._make, self._computed_s = make, computed_s
        self._made: GrammarCompiler | None = None
        self._making = threading.Lock()
        self._fault: str | None = None
        threading.Thread(target=self._create_when_idle, args=(idle_s,), name="grammar compiler", daemon=True).start()

    def compile(self, source: str) -> Grammar:
        return self._compiler().compile(source)

    def _create_when_idle(self, idle_s: float) -> None:
        took_s = idle_s
        while took_s > MAX_IDLE_LOAD * idle_s:
            before_s = self._computed_s()
            time.sleep(idle_s)
            took_s = self._computed_s() - before_s
        with suppress(GrammarFailed):  # reported to every request with a grammar
            self._compiler()

    def _compiler(self) -> GrammarCompiler:
        with self._making:
            if self._made is None and self._fault is None:
                began = time.monotonic()
                try:
                    self._made = self._make()
                except BaseException as error:  # a panic in llguidance is not an Exception
                    logger.exception("grammars cannot be compiled for this model's vocabulary")
                    self._fault = f"no grammar can be compiled for this model's vocabulary: {error}"
                else:
                    logger.info("grammars can be compiled, after %.1f s", time.monotonic() - began)
            if self._made is None:
                raise GrammarFailed(self._fault)
            return self._made
