"""Reads several streams as one, in order of arrival. No stream outlives the reader."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Item(Generic[T]):
    value: T


@dataclass(frozen=True, slots=True)
class _End:
    error: BaseException | None


async def merge_streams(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """The items of all ``streams``. The first failure closes the other streams and is raised; closing this generator closes all.

    Gives backpressure: at most one item of each stream waits here.
    """
    if len(streams) == 1:  # nearly every request; saves a task and a queue
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield item
        return
    arrivals: asyncio.Queue[_Item[T] | _End] = asyncio.Queue(maxsize=1)
    tasks = [asyncio.create_task(_forward(stream, arrivals)) for stream in streams]
    try:
        num_open = len(tasks)
        while num_open:
            arrival = await arrivals.get()
            if isinstance(arrival, _Item):
                yield arrival.value
            elif arrival.error is not None:
                raise arrival.error
            else:
                num_open -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(stream: AsyncGenerator[T, None], arrivals: "asyncio.Queue[_Item[T] | _End]") -> None:
    error = None
    try:
        async with aclosing(stream):
            async for item in stream:
                await arrivals.put(_Item(item))
    except Exception as raised:
        error = raised
    await arrivals.put(_End(error))
