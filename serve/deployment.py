"""The Ray Serve application: a deployment of replicas for each model, and a deployment of fronts for HTTP and gRPC."""

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.serve as ray_serve
from ray.exceptions import ActorDiedError, TaskCancelledError
from ray.serve.schema import LoggingConfig

from cluster.admission_queue import AdmissionQueue
from cluster.autoscaler import serve_autoscaling
from cluster.channel import shared_context
from cluster.directory import DEMAND, Reader
from cluster.peer_notes import PeerNotes
from cluster.placement import REPLICA_CPUS, bundles, on_hosts_with, strategy
from cluster.ray_cluster import host_resources as ray_host_resources
from cluster.replica import Replica
from cluster.replica_link import ReplicaLink
from cluster.router import Router
from cluster.routing_policies import make_routing_policy
from cluster.worker import ModelRankLauncher
from engine.gc_tuning import tune_gc
from model.adapter_files import files_with_adapter
from model.checkpoint_folder import small_files
from serve.auth import KeyAuthenticator, NoAuthentication
from serve.bypass import FrontEndpoint
from serve.catalog import Catalog
from serve.config import ServeConfig
from serve.devices import assign_devices
from serve.drain_gate import DrainGate
from serve.front_router import DRAINING, PROXIES_LEARN_S, front_router_config
from serve.grpc.admin import AdminServicer
from serve.grpc.bypass import send_past_ray
from serve.grpc.health import HealthServicer
from serve.grpc.servicer import MantaServicer
from serve.host_requirements import host_requirements
from serve.http.app import create_app
from serve.idempotency import IdempotentService
from serve.logs import configure
from serve.metrics import Instruments, Snapshot
from serve.metrics_page import METRICS_TOPIC, MetricsPage
from serve.model_facts import ModelFacts
from serve.model_source import download_if_needed, needs_download, source_name
from serve.quotas import Quotas
from serve.rank_download import DownloadingRankLauncher
from serve.replicas_per_host import max_replicas_per_host
from serve.request_metrics import RequestMetrics
from serve.request_observer import Observer
from serve.service import Service
from serve.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from serve.tracing import Tracing

APP = "manta"
SPANS_S = 1.0
"""Limit for the export of the last spans when a front ends."""
FRONTS = "FrontDeployment"
"""Name of the fronts' deployment."""
MAX_CALLS_PER_FRONT = 10_000
"""Far above what admission allows, so that the service rejects requests itself, with proper errors, instead of Ray Serve."""
METRICS_EVERY_S = 2.0
"""How often a front sends its metrics to the other fronts."""
ACCEPTING_TOPIC = "accepting"
"""The topic on which fronts have a note while they accept new requests; see `cluster.peer_notes`."""
ACCEPTING_EVERY_S = 2.0
"""How often a front renews that note, and learns how many others accept requests."""
DEMAND_EVERY_S = 0.5
"""How often a front reports its waiting requests to the autoscaler."""
DISCONNECT_ERRORS = (TaskCancelledError, ActorDiedError)
"""What reading a request's body raises when its client goes, or when the proxy that held the connection dies: the body is fetched by calls
to the proxy, and Ray cancels these with the request, sometimes before the request itself learns that it is cancelled."""
HEALTH_CHECK_PERIOD_S = 1.0
"""Health check period of fronts and replicas: a dead one is noticed, and replaced, after at most this long. (Proxies are not deployments;
a dead proxy is replaced after three checks: `serve.proxy_hook.PROXY_CHECK_PERIOD_S`.)"""
FRONT_MARGIN_S = 5.0
"""Time for a front, after the time for running requests, to end the rest with an error."""
SHUTDOWN_MARGIN_S = 10.0
"""Time after draining for the ranks to end and free their memory."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model of the application: checkpoint, name and settings."""

    location: Path | str
    """A folder that exists on every host, the URL of a folder in object storage, or a location that each host downloads
    (`serve.model_source.download_if_needed`)."""
    adapter: Path | str | None = None
    """Location of the LoRA adapter that is merged into the weights, of the same kinds as ``location``."""
    name: str
    config: ServeConfig
    """Settings of a server with this model only; see `ServeConfig.each_model`."""


@dataclass(frozen=True, kw_only=True)
class ApplicationInfo:
    """What a replica knows about the application that it belongs to."""

    version: str
    """Unique for each rollout that is waited for; see `serve.rollout.deploy`."""
    configs: tuple[ServeConfig, ...]
    """Settings of all models of the application: replicas of different models may share a host."""


def _small_files(model: ServedModel) -> Path:
    """Folder on this host with the model's configuration and tokenizer, without weights."""
    base = small_files(download_if_needed(model.location, weights=False))
    adapter = None if model.adapter is None else small_files(download_if_needed(model.adapter, weights=False))
    return files_with_adapter(base, adapter)


class _ReplicaDeployment:
    """One replica of a model. Fronts connect to it by a socket; Ray Serve only starts, checks and replaces it."""

    async def __init__(self, model: ServedModel, deployed: ApplicationInfo) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        config = model.config
        configure(config.logging.level, config.logging.format)
        folder = await asyncio.to_thread(_small_files, model)
        tokenizer = await asyncio.to_thread(Tokenizer.from_folder, folder)
        runner = dataclasses.replace(config.runner, num_real_tokens=tokenizer.num_real_tokens)
        adapter = None if model.adapter is None or needs_download(model.adapter) else model.adapter
        need = await asyncio.to_thread(host_requirements, folder, config, adapter)
        hosts = await asyncio.to_thread(ray_host_resources)
        self._replica = Replica(
            id=ray_serve.get_replica_context().replica_id.unique_id,
            app=ray_serve.get_replica_context().app_name,
            model=model.name,
            launcher=DownloadingRankLauncher(
                launcher=ModelRankLauncher(
                    checkpoint_folder=model.location,
                    adapter=model.adapter,
                    topology=config.parallel.topology,
                    runner_config=runner,
                    engine_config=config.engine,
                    need=need,
                    replicas_on_host=max_replicas_per_host(config, deployed.configs, hosts),
                )
            ),
            engine_config=config.engine,
            resources=config.resources,
            config=config.replica,
            version=deployed.version,
        )
        await asyncio.to_thread(self._replica.start)
        tune_gc()

    async def check_health(self) -> None:
        self._replica.raise_if_failed()

    async def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # __init__ was interrupted
            await asyncio.to_thread(self._replica.close)


@ray_serve.ingress()
class _Front:
    """HTTP and gRPC for all models. Ray Serve's proxies call the ASGI app for HTTP, and the methods named like gRPC's for gRPC."""

    async def __init__(self, models: Sequence[ServedModel], config: ServeConfig, *replica_deployments: Any) -> None:  # type: ignore[misc]
        """``replica_deployments`` is unused: deployments must be bound for Ray Serve to deploy them."""
        configure(config.logging.level, config.logging.format)
        shared_context()
        self._config = config
        self._routers: list[Router] = []
        app, front = ray_serve.get_replica_context().app_name, ray_serve.get_replica_context().replica_id.unique_id
        instruments, self._peer_metrics = Instruments(front), PeerNotes[Snapshot](app, METRICS_TOPIC, front)
        self._authenticator = NoAuthentication() if config.auth.keys_file is None else KeyAuthenticator(Path(config.auth.keys_file))
        self._accepting = PeerNotes[bool](app, ACCEPTING_TOPIC, front)
        self._quotas = Quotas(num_fronts=lambda: self._accepting.num_peers + 1)
        names = [model.name for model in models]
        self._request_metrics = request_metrics = RequestMetrics(instruments, names)
        observers: list[Observer] = [request_metrics, self._quotas]
        self._tracing: Tracing | None = None
        if config.tracing.otlp_endpoint is not None:
            from serve.tracing import otlp_tracing  # opentelemetry: an extra

            self._tracing = otlp_tracing(config.tracing.otlp_endpoint, names, ratio=config.tracing.ratio)
            observers.append(self._tracing)
        self._catalog = Catalog([await self._make_service(app, model, names, observers=observers) for model in models])
        self._gate = DrainGate(IdempotentService(self._catalog), on_refusal=request_metrics.refused)
        self._metrics = MetricsPage(instruments, self._routers, self._peer_metrics, self._gate)
        self._peer_metrics.keep_publishing(self._metrics.own, every_s=METRICS_EVERY_S)
        self._accepting.keep_publishing(lambda: None if self._gate.draining else True, every_s=ACCEPTING_EVERY_S)
        self._warming = asyncio.create_task(self._catalog.warm_up(), name="warm-up")  # concurrent with the first requests
        self._bypass = FrontEndpoint(ray.get_runtime_context().get_node_id())
        self._grpc = MantaServicer(
            self._gate, authenticator=self._authenticator, on_error=functools.partial(request_metrics.answered_with, "grpc")
        )
        self._admin = AdminServicer(
            self._gate,
            self._routers,
            authenticator=self._authenticator,
            drain_notice_s=lambda: PROXIES_LEARN_S if self._peer_metrics.num_peers else 0.0,
        )
        self._health = HealthServicer(self._gate.ready)
        self._demand = PeerNotes[dict[str, Any]](app, DEMAND, front)
        if any(model.config.replicas.vary for model in models):  # otherwise there is no autoscaler to read it
            self._demand.keep_publishing(self._waiting_requests, every_s=DEMAND_EVERY_S)
        tune_gc()

    async def _make_service(self, app: str, model: ServedModel, names: Sequence[str], *, observers: Sequence[Observer]) -> Service:
        """Connect to a model's replicas and create the service for it. ``names``: names of all models."""
        node = ray.get_runtime_context().get_node_id()
        replicas, scaling = model.config.replicas, model.config.autoscaling
        starts = replicas.least == 0  # scale from zero: a waiting request starts a replica
        router = Router(
            admission_queue=AdmissionQueue(wait_s=scaling.hold_s, max_held=scaling.max_held, can_scale_from_zero=True) if starts else None,
            replicas=Reader(app, model=model.name),
            connect=lambda record: ReplicaLink(record, node=node, config=model.config.router),
            policy=make_routing_policy(model.config.router, model.config.engine, model.config.parallel.topology),
            config=model.config.router,
        )
        self._routers.append(router)
        await router.open()
        folder = await asyncio.to_thread(_small_files, model)
        tokenizer = await asyncio.to_thread(Tokenizer.from_folder, folder)
        facts = ModelFacts.from_checkpoint(
            folder,
            name=model.name,
            tokenizer=tokenizer,
            max_context_tokens=model.config.runner.max_context_tokens,
            pooling=model.config.model.pooling,
            base=source_name(model.config.model.source),
            adapter=model.config.model.adapter and source_name(model.config.model.adapter),
        )
        return Service(
            model=facts,
            tokenizer=tokenizer,
            source=router,
            refusal=router.recent_refusal,
            limits=model.config.limits,
            observers=observers,
            tool_protocol=model.config.tools.protocol,
            names=names,
            requests_are_ended=lambda: self._gate.has_ended_requests,
        )

    def _waiting_requests(self) -> dict[str, Any]:
        """The requests that wait in this front, by model, for the autoscaler."""
        return {facts.name: router.admission_queue.demand() for facts, router in zip(self._catalog.models(), self._routers, strict=True)}

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(
            lambda: self._gate,
            limits=self._config.limits,
            metrics=lambda accept: self._metrics(accept),
            authenticator=lambda: self._authenticator,
            quota_headers=lambda caller: self._quotas.headers(caller),
            strict=self._config.http.strict,
            allowed_origins=self._config.http.allowed_origins,
            behind_ray=True,
            disconnect_errors=DISCONNECT_ERRORS,
            bypass=self._bypass,
            on_error=lambda error: self._request_metrics.answered_with("http", error),
        )

    async def __del__(self) -> None:
        with contextlib.suppress(AttributeError):
            self._warming.cancel()
            if self._tracing is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.to_thread(self._tracing.close), SPANS_S)
            await self._peer_metrics.close()
            await self._accepting.close()
            await self._demand.close()
            for router in self._routers:
                await router.close()

    async def record_routing_stats(self) -> dict[str, Any]:
        """Ray Serve's controller calls it, for the proxies (`serve.front_router`)."""
        return {DRAINING: self._gate.draining}

    # `serve.stop_requests` calls these when the application is removed.

    async def drain(self) -> int:
        """Refuse new requests. Returns how many are open."""
        self._gate.drain()
        return self._gate.num_open

    async def end_requests(self, grace_s: float) -> None:
        await self._gate.end_requests(grace_s)

    # Ray Serve calls these by their gRPC method names, and passes the context if there is a parameter called grpc_context.

    async def Chat(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._grpc.Chat(request, grpc_context)

    async def Generate(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._grpc.Generate(request, grpc_context)

    async def ListModels(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._grpc.ListModels(request, grpc_context)

    async def GetModel(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._grpc.GetModel(request, grpc_context)

    async def Embed(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._grpc.Embed(request, grpc_context)

    async def Tokenize(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._grpc.Tokenize(request, grpc_context)

    async def Detokenize(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._grpc.Detokenize(request, grpc_context)

    async def GetServerInfo(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._admin.GetServerInfo(request, grpc_context)

    async def GetLoad(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._admin.GetLoad(request, grpc_context)

    async def Abort(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._admin.Abort(request, grpc_context)

    async def Drain(self, request: Any, grpc_context: Any) -> Any:  # noqa: N802
        return await self._admin.Drain(request, grpc_context)

    async def ChatStream(self, request: Any, grpc_context: Any) -> AsyncIterator[Any]:  # noqa: N802
        async with contextlib.aclosing(
            send_past_ray(self._grpc.ChatStream(request, grpc_context), grpc_context, self._bypass)
        ) as responses:
            async for response in responses:
                yield response

    async def GenerateStream(self, request: Any, grpc_context: Any) -> AsyncIterator[Any]:  # noqa: N802
        async with contextlib.aclosing(
            send_past_ray(self._grpc.GenerateStream(request, grpc_context), grpc_context, self._bypass)
        ) as responses:
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


def build_app(models: Sequence[ServedModel], config: ServeConfig, *, version: str = "") -> ray_serve.Application:
    """Build the application: a deployment per model, whose replicas each have a placement group, and the fronts' deployment.

    ``version``: see `ApplicationInfo`. Devices that the settings leave open are chosen here, by the resources of the connected Ray.

    Raises:
        DeviceError: see `serve.devices.assign_devices`.
    """
    if ray.is_initialized():  # not during `serve build`, which writes a config for some other cluster
        decided = assign_devices([model.config for model in models], ray_host_resources())
        models = [dataclasses.replace(model, config=one) for model, one in zip(models, decided, strict=True)]
    deployed = ApplicationInfo(version=version, configs=tuple(model.config for model in models))
    fronts: Any = ray_serve.deployment(
        _Front,
        name=FRONTS,
        num_replicas=config.fronts.count,
        ray_actor_options={"num_cpus": 0, "resources": on_hosts_with(config.fronts.host_resource)},
        max_ongoing_requests=MAX_CALLS_PER_FRONT,
        request_router_config=front_router_config(),
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=max(model.config.replica.drain_timeout_s for model in models) + FRONT_MARGIN_S,
        max_constructor_retry_count=2,
        max_surge_percent=100,  # fronts are cheap, and a new front that fails to start must not have replaced a working one
        logging_config=_logging(config),
    )
    app: ray_serve.Application = fronts.bind(tuple(models), config, *(_replica_deployment(model, deployed) for model in models))
    return app


def _replica_deployment(model: ServedModel, deployed: ApplicationInfo) -> Any:
    config = model.config
    deployment: Any = ray_serve.deployment(
        _ReplicaDeployment,
        name=replica_deployment_name(model.name),
        **_number_of_replicas(model),
        max_surge_percent=config.replicas.max_surge_percent,
        placement_group_bundles=bundles(config.parallel.topology, config.resources),
        placement_group_strategy=strategy(config.resources),
        ray_actor_options={"num_cpus": REPLICA_CPUS},
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=config.replica.drain_timeout_s + SHUTDOWN_MARGIN_S,
        max_constructor_retry_count=2,
        logging_config=_logging(config),
    )
    return deployment.bind(model, deployed)


def _number_of_replicas(model: ServedModel) -> dict[str, Any]:
    replicas, config = model.config.replicas, model.config
    if not replicas.vary:
        return {"num_replicas": replicas.initial}
    scaling = serve_autoscaling(
        config.autoscaling,
        model=model.name,
        max_running=config.engine.max_running,
        least=replicas.least,
        most=replicas.most,
        initial=replicas.initial,
    )
    return {"autoscaling_config": scaling}


def replica_deployment_name(model: str) -> str:
    """Name of a model's deployment: the model's name with characters replaced that Ray Serve may not accept.

    Qwen/Qwen2-7B  ->  EngineDeployment-Qwen-Qwen2-7B-3f81c2
    """
    # The prefix stays: Ray Serve upgrades a deployment replica by replica only if the name is the same.
    plain = re.sub(r"[^A-Za-z0-9_.]+", "-", model)
    return f"EngineDeployment-{plain}" + (f"-{hashlib.sha256(model.encode()).hexdigest()[:6]}" if plain != model else "")


def _logging(config: ServeConfig) -> LoggingConfig:
    return LoggingConfig(log_level=config.logging.level.upper(), encoding=config.logging.format.upper(), enable_access_log=False)
