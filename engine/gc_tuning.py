"""Python's collector of cycles in a process that makes some objects for every token: a front, a replica, a rank."""

import gc

YOUNG_OBJECTS = 50_000
"""Made since the last look before there is another; Python's own 700 means a look every few dozen tokens."""


def tune_gc() -> None:
    """What is there now (modules, the tokenizer, the model) stays and is not looked at again; the rest is looked at more rarely. Once in a
    process, when it has started."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 20, 50)
