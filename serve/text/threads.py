"""Work on long texts is done beside the event loop, so that no other stream waits for it."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

INLINE_CHARS = 4_096
"""Texts up to this length are encoded in about the time that a change of threads costs."""


async def beside_the_loop(num_chars: int, work: Callable[[], T]) -> T:
    """What ``work`` returns; in a thread when it is about more than a few characters."""
    return work() if num_chars <= INLINE_CHARS else await asyncio.to_thread(work)
