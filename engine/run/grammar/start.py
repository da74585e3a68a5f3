"""From a checkpoint's vocabulary to a rank that can follow grammars."""

import logging
import time
from pathlib import Path

from engine.run.grammar.guides import Guides
from engine.run.settings import RunnerConfig
from model.vocabulary import Vocabulary

log = logging.getLogger(__name__)


def open_guides(folder: Path, vocab_size: int, config: RunnerConfig) -> Guides:
    """``vocab_size`` ids can be sampled. Without a byte-level tokenizer.json grammars are refused, one by one.

    Raises:
        InvalidModelConfig: tokenizer.json is damaged.
    """
    began = time.monotonic()
    vocabulary = Vocabulary.from_checkpoint(folder)
    if vocabulary is None or not vocabulary.special_ids:
        return Guides(None, vocab_size=vocab_size)
    from engine.run.grammar.llg import LlCompiler  # llguidance, which machines that only measure models need not have

    compiler = LlCompiler(vocabulary, cache_bytes=config.grammar_cache_bytes)
    log.info("grammars over %d ids are ready after %.1f s", len(vocabulary.tokens), time.monotonic() - began)
    return Guides(compiler, vocab_size=vocab_size, special_ids=sorted(vocabulary.special_ids))
