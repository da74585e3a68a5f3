"""Python's collector of cycles in a process that makes some objects for every token."""

import gc

YOUNG_OBJECTS = 50_000
"""Made since the last look before there is another; Python's own 700 means a look every few dozen tokens."""


def settle() -> None:
    """What is there now (modules, the tokenizer) stays and is not looked at again; the rest is looked at more rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 20, 50)
