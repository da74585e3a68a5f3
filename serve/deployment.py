"""The server on Ray Serve: a deployment of engines, and one of fronts that speaks HTTP and gRPC."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.serve as ray_serve
from ray.serve.schema import LoggingConfig

from cluster.board import Board
from cluster.directory import Reader
from cluster.link import ReplicaLink
from cluster.placement import REPLICA_CPUS, bundles, on_hosts_with, strategy
from cluster.replica import Replica
from cluster.router import Router
from cluster.worker import ModelRanks
from model.checkpoint_folder import small_files
from serve.config import ServeConfig
from serve.grpc.health import HealthServicer
from serve.grpc.servicer import MantaServicer
from serve.http.app import create_app
from serve.measuring import Measuring
from serve.metrics import Instruments, Snapshot
from serve.metrics_page import MetricsPage
from serve.model_facts import ModelFacts
from serve.need import need_of
from serve.service import Service
from serve.text.tokenizer import Tokenizer

APP = "manta"
MAX_CALLS_PER_FRONT = 10_000
"""Far above what admission lets in: refusing is the service's business, with proper errors."""
METRICS_EVERY_S = 2.0
"""How often a front tells the others what it measured."""
SHUTDOWN_MARGIN_S = 10.0
"""Beyond draining, for the ranks to end and their memory to be freed."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint and its name for clients."""

    place: Path | str
    """A folder that is there on every host, or the URL of one in a store."""
    name: str


class _Engine:
    """One replica of the model. Fronts reach it by its own socket; Ray Serve starts it, checks it and replaces it."""

    async def __init__(self, model: Model, config: ServeConfig) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        folder = await asyncio.to_thread(small_files, model.place)
        tokenizer = await asyncio.to_thread(Tokenizer.from_folder, folder)
        runner = dataclasses.replace(config.runner, num_real_tokens=tokenizer.num_real_tokens)
        self._replica = Replica(
            id=ray_serve.get_replica_context().replica_id.unique_id,
            app=APP,
            model=model.name,
            ranks=ModelRanks(
                checkpoint_folder=model.place,
                topology=config.parallel.topology,
                runner_config=runner,
                engine_config=config.engine,
                need=need_of(folder, config),
            ),
            engine_config=config.engine,
            resources=config.resources,
            config=config.replica,
        )
        await asyncio.to_thread(self._replica.start)

    async def check_health(self) -> None:
        self._replica.check()

    async def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # its start was cut off
            await asyncio.to_thread(self._replica.close)


@ray_serve.ingress()
class _Front:
    """HTTP and gRPC over one service. Ray Serve's proxies call the ASGI app, and the methods by their gRPC names."""

    async def __init__(self, model: Model, config: ServeConfig, engine: Any) -> None:  # type: ignore[misc]
        self._config = config
        node = ray.get_runtime_context().get_node_id()
        self._router = Router(
            replicas=Reader(APP),
            connect=lambda record: ReplicaLink(record, node=node, config=config.router),
            config=config.router,
        )
        await self._router.open()
        folder = await asyncio.to_thread(small_files, model.place)
        tokenizer = await asyncio.to_thread(Tokenizer.from_folder, folder)
        facts = ModelFacts.from_checkpoint(
            folder, name=model.name, tokenizer=tokenizer, max_context_tokens=config.runner.max_context_tokens
        )
        front = ray_serve.get_replica_context().replica_id.unique_id
        instruments, self._board = Instruments(front), Board[Snapshot](APP, "metrics", front)
        self._metrics = MetricsPage(instruments, self._router, self._board)
        self._board.keep_pinned(self._metrics.own, every_s=METRICS_EVERY_S)
        measuring = Measuring(instruments, [facts.name])
        self._service = Service(model=facts, tokenizer=tokenizer, source=self._router, limits=config.limits, observers=[measuring])
        self._grpc = MantaServicer(self._service)
        self._health = HealthServicer(self._service.ready)

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(lambda: self._service, limits=self._config.limits, metrics=lambda accept: self._metrics(accept), behind_ray=True)

    async def __del__(self) -> None:
        with contextlib.suppress(AttributeError):
            await self._board.close()
            await self._router.close()

    # The names below are gRPC's; Ray Serve looks for a parameter called grpc_context.

    async def Chat(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._grpc.Chat(request, grpc_context)

    async def Generate(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._grpc.Generate(request, grpc_context)

    async def ListModels(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._grpc.ListModels(request, grpc_context)

    async def GetModel(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._grpc.GetModel(request, grpc_context)

    async def ChatStream(self, request: Any, grpc_context: Any) -> AsyncIterator[Any]:  # noqa: N802
        async with contextlib.aclosing(self._grpc.ChatStream(request, grpc_context)) as responses:
            async for response in responses:
                yield response

    async def GenerateStream(self, request: Any, grpc_context: Any) -> AsyncIterator[Any]:  # noqa: N802
        async with contextlib.aclosing(self._grpc.GenerateStream(request, grpc_context)) as responses:
            async for response in responses:
                yield response

    async def Check(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._health.Check(request, grpc_context)

    async def List(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._health.List(request, grpc_context)

    async def Watch(self, request: Any, grpc_context: Any) -> AsyncIterator[Any]:  # noqa: N802
        async with contextlib.aclosing(self._health.Watch(request, grpc_context)) as responses:
            async for response in responses:
                yield response


def build_app(model: Model, config: ServeConfig) -> ray_serve.Application:
    """The application: every engine replica in a placement group of its own, fronts beside them."""
    topology = config.parallel.topology
    logging = LoggingConfig(log_level=config.logging.level.upper(), enable_access_log=False)
    engines: Any = ray_serve.deployment(
        _Engine,
        name="EngineDeployment",
        num_replicas=config.replicas.count,
        placement_group_bundles=bundles(topology, config.resources),
        placement_group_strategy=strategy(config.resources),
        ray_actor_options={"num_cpus": REPLICA_CPUS},
        health_check_period_s=2,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=config.replica.drain_timeout_s + SHUTDOWN_MARGIN_S,
        max_constructor_retry_count=2,
        logging_config=logging,
    )
    fronts: Any = ray_serve.deployment(
        _Front,
        name="FrontDeployment",
        num_replicas=config.fronts.count,
        ray_actor_options={"num_cpus": 0, "resources": on_hosts_with(config.fronts.host_resource)},
        max_ongoing_requests=MAX_CALLS_PER_FRONT,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=config.replica.drain_timeout_s,
        max_constructor_retry_count=2,
        logging_config=logging,
    )
    app: ray_serve.Application = fronts.bind(model, config, engines.bind(model, config))
    return app
