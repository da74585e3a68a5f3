"""A front's router over the replicas of an application, and what it answers."""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import ray

from cluster.config import RouterConfig
from cluster.directory import Reader
from cluster.replica_link import ReplicaLink
from cluster.router import Router
from engine.request import Request
from tests.cluster.fakes import eventually


@asynccontextmanager
async def front(app: str) -> AsyncIterator[Router]:
    config = RouterConfig(refresh_s=0.1, ping_s=0.2, replica_silence_s=60)  # a busy machine is silent for seconds at times
    node = ray.get_runtime_context().get_node_id()
    router = Router(replicas=Reader(app), connect=lambda record: ReplicaLink(record, node=node, config=config), config=config)
    await router.open()
    try:
        await eventually(router.ready)
        yield router
    finally:
        await router.close()


async def answer(router: Router, request: Request, at_token: Callable[[int], None] = lambda _position: None) -> list[int]:
    tokens: list[int] = []
    async with aclosing(router.stream(request)) as events:
        async for event in events:
            assert event.error_kind is None, event.error_message
            assert event.offset == len(tokens)
            tokens += event.tokens
            at_token(len(tokens))
    assert event.finish_reason == "length"
    return tokens
