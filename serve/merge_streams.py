"""Several streams read as one, in order of arrival; none outlives the reader."""

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


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Items of all ``streams``. The first failure of one closes the others and is raised; so does closing this generator close all.

    A slow reader slows the streams: at most one item of each waits here.
    """
    if len(streams) == 1:  # nearly every request: spares a task and a queue
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
