"""The whole table of bad input against a server as it runs: Ray Serve's proxy reads HTTP and gRPC before our fronts do."""

from collections.abc import AsyncIterator

import psutil
import pytest
import pytest_asyncio

from tests.processes import named
from tests.serve.bad_input.checks import MOST_GROWTH_BYTES, Target, least_growth, refused_over_grpc, refused_over_http, resident, targeted
from tests.serve.bad_input.framing import Framing, framings, refused_on_the_socket
from tests.serve.bad_input.table import MODEL, Row, rows
from tests.serve.in_process import write_tiny
from tests.system.server import Server, serving

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

ANSWER_S = 60.0
ROWS, FRAMINGS = rows(), framings(model=MODEL)


def living(server: Server) -> list[psutil.Process]:
    """Proxy, fronts and ranks."""
    proxies = named(server.descendants, "ray::ProxyActor")
    assert proxies
    return [*proxies, *server.fronts(), *server.ranks()]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def target(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Target]:
    folder = write_tiny(tmp_path_factory.mktemp("tiny"))
    with serving(str(folder), "--name", MODEL, "--dtype", "float32", "--set", "model.pooling=last") as server:
        async with targeted(
            server.url,
            server.grpc.removeprefix("grpc://"),
            model=MODEL,
            pids=lambda: frozenset(process.pid for process in living(server)),
            rss=lambda: resident(*living(server)),
            answer_s=ANSWER_S,
        ) as target:
            yield target


@pytest.mark.parametrize("row", [row for row in ROWS if row.over_http], ids=lambda row: row.name)
async def test_over_http_it_is_refused_and_leaves_no_trace(target: Target, row: Row) -> None:
    await refused_over_http(target, row)
    await target.is_unharmed()


@pytest.mark.parametrize("row", [row for row in ROWS if row.over_grpc], ids=lambda row: row.name)
async def test_over_grpc_it_is_refused_and_leaves_no_trace(target: Target, row: Row) -> None:
    await refused_over_grpc(target, row)
    await target.is_unharmed()


@pytest.mark.parametrize("row", FRAMINGS, ids=lambda row: row.name)
async def test_on_the_proxys_socket_it_is_refused_and_leaves_no_trace(target: Target, row: Framing) -> None:
    await refused_on_the_socket(target, row)
    await target.is_unharmed()


async def test_the_whole_table_again_takes_no_more_memory(target: Target) -> None:
    async def once_more() -> None:
        for row in ROWS:
            if row.over_http:
                await target.http.request(**row.http(model=target.model))
        for row in FRAMINGS:
            await refused_on_the_socket(target, row)

    assert await least_growth(target, once_more) < MOST_GROWTH_BYTES
