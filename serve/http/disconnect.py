"""Cancels the work for a client that disconnects."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.types import Message, Receive

T = TypeVar("T")


class ClientDisconnected(Exception):
    """The client closed its connection, so there is nobody to answer."""


def with_disconnects(receive: Receive, errors: tuple[type[Exception], ...]) -> Receive:
    """``receive`` that returns a disconnect where it would raise one of ``errors``, by which the server in front says that the client is
    gone."""

    async def receive_or_disconnect() -> Message:
        try:
            return await receive()
        except errors:
            return {"type": "http.disconnect"}

    return receive_or_disconnect


async def cancel_on_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled if the client disconnects. The request's body must have been read before.

    Raises:
        ClientDisconnected: the client disconnected first.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnected
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
