"""Tunes Python's cyclic garbage collector for processes that make some objects per token: fronts, replicas and ranks."""

import gc

YOUNG_OBJECTS = 50_000
"""New objects before the youngest generation is collected. With Python's default of 700 that happens every few dozen tokens."""


def tune_gc() -> None:
    """Freeze what exists now (modules, the tokenizer, the model), so that it is never scanned again, and collect the rest more rarely.

    To be called once in a process, when it has started.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 20, 50)
