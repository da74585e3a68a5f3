"""Work on long texts runs in a thread, so that it does not block the event loop and with it all other streams."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

INLINE_CHARS = 2_048
"""Encoding a text of this length takes at most 2 ms on the slowest machines we know."""


async def run_in_thread_if_long(num_chars: int, work: Callable[[], T]) -> T:
    """The result of ``work``, which runs in a thread if ``num_chars`` is more than `INLINE_CHARS`."""
    return work() if num_chars <= INLINE_CHARS else await asyncio.to_thread(work)
