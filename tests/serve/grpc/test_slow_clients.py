"""A stream over gRPC whose client does not read ends, and its source is told; one that is read slowly goes on."""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import grpc.aio
import pytest

from serve.grpc.slow_clients import abort_slow_clients

PIECE = bytes(8192)


class Source:
    """Tells what became of it, as Ray Serve's proxy sees it: cancelled while it waits for the next message."""

    def __init__(self, *, num: int) -> None:
        self.num, self.sent, self.cancelled = num, 0, asyncio.Event()

    async def __call__(self, _request: Any, _context: Any) -> AsyncGenerator[bytes, None]:
        try:
            for _ in range(self.num):
                await asyncio.sleep(0)
                self.sent += 1
                yield PIECE
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


async def opened(source: Source, limit_s: float) -> tuple[grpc.aio.Server, grpc.aio.Channel]:
    server = grpc.aio.server()
    handler = abort_slow_clients(grpc.unary_stream_rpc_method_handler(source), limit_s)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("a.B", {"C": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)])


async def to_the_end(call: grpc.aio.UnaryStreamCall) -> int:
    """How many messages there still were."""
    count = 0
    while await call.read() is not grpc.aio.EOF:
        count += 1
    return count


async def test_who_does_not_read_is_left_and_the_source_cancelled() -> None:
    source = Source(num=100_000)
    server, channel = await opened(source, 0.2)
    async with channel:
        call = channel.unary_stream("/a.B/C")(b"")
        assert await call.read() == PIECE
        async with asyncio.timeout(60):
            await source.cancelled.wait()
            with pytest.raises(grpc.aio.AioRpcError, match="nothing of this stream was read") as told:
                await to_the_end(call)
            assert told.value.code() is grpc.StatusCode.ABORTED
    assert source.sent < source.num
    await server.stop(0)


async def test_a_stream_that_grpc_leaves_while_a_message_is_sent_is_cancelled_and_not_only_closed() -> None:
    """gRPC drops the generator of a call that is cancelled then."""
    source = Source(num=100_000)
    handler = abort_slow_clients(grpc.unary_stream_rpc_method_handler(source), 30.0)
    messages = handler.unary_stream(b"", None)
    assert await anext(messages) == PIECE
    del messages
    async with asyncio.timeout(60):
        await source.cancelled.wait()


async def test_who_reads_slowly_gets_all_of_it() -> None:
    source = Source(num=60)
    server, channel = await opened(source, 30.0)
    async with channel:
        call = channel.unary_stream("/a.B/C")(b"")
        count = 0
        while await call.read() is not grpc.aio.EOF:
            count += 1
            await asyncio.sleep(0.005)
        assert (count, await call.code()) == (60, grpc.StatusCode.OK)
    assert not source.cancelled.is_set()
    await server.stop(0)


async def test_a_server_that_stood_still_itself_does_not_blame_its_clients() -> None:
    source = Source(num=2_000)
    server, channel = await opened(source, 5.0)
    async with channel:
        call = channel.unary_stream("/a.B/C")(b"")
        assert await call.read() == PIECE
        before = 0
        while source.sent > before:  # until it waits for the client
            before = source.sent
            await asyncio.sleep(0.2)
        time.sleep(5.2)  # noqa: ASYNC251  (the loop is what stands still)
        assert await to_the_end(call) == 1_999
    await server.stop(0)
