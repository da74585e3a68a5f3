"""Compiles what clients send, in a process that may die of it: ``python -m serve.structured.compiler_process FOLDER SECONDS BYTES``.

Reads a JSON line ``{"kind", "text"}``, answers with a line ``{"grammar"}`` or ``{"error"}``, until its input ends. A grammar
that takes longer than SECONDS of a CPU ends the process by a signal, also in the midst of the library; one that wants more than
BYTES of memory ends it too. Nobody else is hurt.
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

TRIED_TOKENS = 3


def main() -> None:
    folder, seconds, memory_bytes = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    vocabulary = Vocabulary.from_checkpoint(folder)
    if vocabulary is None or not vocabulary.special_ids:
        _say({"error": "this model has no byte-level tokenizer.json, so its answers cannot follow a grammar"})
        return
    compiler = LlCompiler(vocabulary, cache_bytes=0)
    _bound_memory(memory_bytes)
    _say({"ready": True})
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer = _compiled(compiler, **json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(answer)


def _compiled(compiler: LlCompiler, kind: str, text: str) -> dict[str, Any]:
    try:
        grammar = lark_of(kind, text)
        _follow(compiler.compile(grammar))
    except GrammarFailed as error:
        return {"error": str(error)}
    except (MemoryError, RecursionError):
        return {"error": "the grammar is too large"}
    return {"grammar": grammar}


def _follow(grammar: LlGrammar) -> None:
    """Some tokens along: a grammar may compile and yet be too much from its second token on, which no rank should have to find out.

    Raises:
        GrammarFailed: it is.
    """
    for _ in range(TRIED_TOKENS):
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(grammar.mask(), np.uint8), bitorder="little"))
        if len(allowed) == 0:
            return
        if not grammar.accept([int(allowed[0])]):
            raise GrammarFailed("the grammar is too large to be followed")
    grammar.mask()


def _bound_memory(memory_bytes: int) -> None:
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
