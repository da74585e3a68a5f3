"""Every row of rows.yaml over HTTP and gRPC against one engine in this process: what is refused, how, and that nothing is worse for it."""

import contextlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from tests.serve.bad_input.checks import MOST_GROWTH_BYTES, Target, least_growth, refused_over_grpc, refused_over_http, resident, targeted
from tests.serve.bad_input.framing import Framing, connected, framings, refused_on_the_socket
from tests.serve.bad_input.table import MODEL, Row, rows
from tests.serve.in_process import fronts

pytestmark = pytest.mark.asyncio(loop_scope="module")

ANSWER_S = 60.0
"""A hang is seen by it, and no more: these tests run beside others, and never time anything."""
ROWS = rows()
FRAMINGS = framings(model=MODEL)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def target(tiny_folder: Path) -> AsyncIterator[Target]:
    async with (
        fronts(tiny_folder, pooling="last") as running,
        targeted(
            running.http,
            running.grpc.removeprefix("grpc://"),
            model=MODEL,
            pids=lambda: frozenset(thread.ident or 0 for thread in threading.enumerate() if thread.name == "engine"),
            rss=lambda: resident(psutil.Process()),
            answer_s=ANSWER_S,
        ) as target,
    ):
        yield target
        assert running.source.is_idle


@pytest.mark.parametrize("row", [row for row in ROWS if row.over_http], ids=lambda row: row.name)
async def test_over_http_it_is_refused_and_leaves_no_trace(target: Target, row: Row) -> None:
    await refused_over_http(target, row)
    await target.is_unharmed()


@pytest.mark.parametrize("row", [row for row in ROWS if row.over_grpc], ids=lambda row: row.name)
async def test_over_grpc_it_is_refused_and_leaves_no_trace(target: Target, row: Row) -> None:
    await refused_over_grpc(target, row)
    await target.is_unharmed()


@pytest.mark.parametrize("row", FRAMINGS, ids=lambda row: row.name)
async def test_on_the_socket_it_is_refused_and_leaves_no_trace(target: Target, row: Framing) -> None:
    await refused_on_the_socket(target, row)
    await target.is_unharmed()


async def test_a_hundred_clients_that_never_finish_a_request_keep_nobody_waiting(target: Target) -> None:
    async with contextlib.AsyncExitStack() as held:
        for number in range(100):
            _, writer = await held.enter_async_context(connected(str(target.http.base_url)))
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n"[: 1 + number % 40])
        await target.is_unharmed()
    await target.is_unharmed()


async def test_the_sockets_of_the_whole_table_again_take_no_more_memory(target: Target) -> None:
    async def once_more() -> None:
        for row in FRAMINGS:
            await refused_on_the_socket(target, row)

    assert await least_growth(target, once_more) < MOST_GROWTH_BYTES


async def test_the_whole_table_again_takes_no_more_memory(target: Target) -> None:
    async def once_more() -> None:
        for row in ROWS:
            if row.over_http:
                await target.http.request(**row.http(model=target.model))

    assert await least_growth(target, once_more) < MOST_GROWTH_BYTES


async def test_the_table_is_long_and_says_each_thing_once() -> None:
    names = [row.name for row in (*ROWS, *FRAMINGS)]
    assert len(names) == len(set(names))
    assert len(names) >= 80
    assert all(row.over_http or row.over_grpc for row in ROWS)
