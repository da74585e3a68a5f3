"""Work on long texts is done beside the event loop, so that no other stream waits for it."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

INLINE_CHARS = 2_048
"""Texts up to this length are encoded in 2 ms at most, on the slowest machines we know."""


async def beside_the_loop(num_chars: int, work: Callable[[], T]) -> T:
    """What ``work`` returns; in a thread when it is about more than a few characters."""
    return work() if num_chars <= INLINE_CHARS else await asyncio.to_thread(work)
