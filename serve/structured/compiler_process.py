"""The process that compiles clients' grammars: ``python -m serve.structured.compiler_process FOLDER SECONDS BYTES``.

Reads JSON lines ``{"kind", "text"}`` and answers each with a line ``{"grammar"}`` or ``{"error"}``, until its input ends. A grammar
that takes more than SECONDS of CPU time ends the process by a signal, even inside the library; so does one that needs more than BYTES
of memory. Nothing else is affected.
"""

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import GrammarFailed
from engine.run.grammar.llg import LlCompiler, LlGrammar, lark_of
from model.vocabulary import Vocabulary

NUM_TRIED_TOKENS = 3


def main() -> None:
    folder, seconds, memory_bytes = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    vocabulary = Vocabulary.from_checkpoint(folder)
    if vocabulary is None or not vocabulary.special_ids:
        _write({"error": "this model has no byte-level tokenizer.json, so its answers cannot follow a grammar"})
        return
    compiler = LlCompiler(vocabulary, cache_bytes=0)
    _limit_memory(memory_bytes)
    _write({"ready": True})
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer = _compile(compiler, **json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(answer)


def _compile(compiler: LlCompiler, kind: str, text: str) -> dict[str, Any]:
    try:
        grammar = lark_of(kind, text)
        _try_tokens(compiler.compile(grammar))
    except GrammarFailed as error:
        return {"error": str(error)}
    except (MemoryError, RecursionError):
        return {"error": "the grammar is too large"}
    return {"grammar": grammar}


def _try_tokens(grammar: LlGrammar) -> None:
    """Follows the grammar for a few tokens: one that compiles may still exceed the limits from its second token on.

    Raises:
        GrammarFailed: it does.
    """
    for _ in range(NUM_TRIED_TOKENS):
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(grammar.mask(), np.uint8), bitorder="little"))
        if len(allowed) == 0:
            return
        if not grammar.accept([int(allowed[0])]):
            raise GrammarFailed("the grammar is too large to be followed")
    grammar.mask()


def _limit_memory(memory_bytes: int) -> None:
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _write(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
