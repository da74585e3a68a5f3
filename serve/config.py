"""Every setting of a server, in one tree of sections. The packages' own frozen dataclasses are sections as they are.

Read from a YAML file, the environment and flags by `serve.config_sources`; described by `serve.config_docs`. Pydantic
checks types here, at the edge, and calls each dataclass's own check; below `serve/` nobody knows of pydantic.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.autoscaling import AutoscalingConfig
from cluster.config import RankResources, ReplicaConfig, RouterConfig
from engine.config import EngineConfig
from engine.run.settings import RunnerConfig, draft_model_of
from parallel.topology import Topology
from serve.limits import Limits
from serve.tools.protocol import ProtocolName

DERIVED = frozenset({"runner.num_real_tokens"})
"""Fields that the server fills from the checkpoint; nobody can set them."""


class Section(BaseModel):
    """Frozen, no unknown keys, fields documented by the docstring below them (in the packages' dataclasses too)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ModelSettings(Section):
    """Which model is served, and under which name."""

    source: str = Field(default="demo", min_length=1)
    """A folder, "demo", a repository id of the Hugging Face hub (also as hf://owner/name), modelscope://owner/name, or the URL
    of a folder in a store: s3://bucket/folder, gs://bucket/folder, or another that fsspec knows."""
    name: str | None = Field(default=None, min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:/-]+$")
    """What clients call it. None = the repository id, or the folder's name, of the adapter if there is one."""
    revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit on the hub. None = the hub's default."""
    adapter: str | None = Field(default=None, min_length=1)
    """A LoRA adapter (as PEFT stores it) that is added to the weights while they are loaded: a folder, a repository or a URL, as
    `source` takes them. The model is then called as the adapter is, unless `name` says otherwise. None = the model as it is."""
    adapter_revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit of the adapter on the hub. None = the hub's default."""
    pooling: Literal["auto", "last", "mean", "first"] = "auto"
    """How it makes embeddings: as its files say (modules.json of sentence-transformers), or of the last token's hidden state, the
    mean of all, or the first one's, normalised."""

    @model_validator(mode="after")
    def _revisions_have_something(self) -> "ModelSettings":
        if self.adapter_revision is not None and self.adapter is None:
            raise ValueError("adapter_revision is set, and there is no adapter")
        return self


class ParallelSettings(Section):
    """How one replica is split over ranks."""

    tensor: int = 1
    """Ranks that share attention heads, MLPs and the vocabulary. Need not divide the number of heads."""
    expert: int = 1
    """Groups of ranks over which the routed experts of a Qwen2-MoE are spread; divides tensor x data."""
    pipeline: int = 1
    """Stages of consecutive layers."""
    data: int = 1
    """Copies of the attention within one replica, each with its own sequences."""

    @model_validator(mode="after")
    def _forms_a_replica(self) -> "ParallelSettings":
        _ = self.topology  # raises InvalidTopology, a ValueError
        return self

    @property
    def topology(self) -> Topology:
        return Topology(tp=self.tensor, ep=self.expert, pp=self.pipeline, dp=self.data)


class ReplicasSettings(Section):
    """How many replicas of the model there are. Where `min` and `max` differ, as many as are needed; see `autoscaling`."""

    count: int | None = Field(default=None, ge=0)
    """Replicas in the beginning, each with ranks of its own. None = `min`, else 1."""
    min: int | None = Field(default=None, ge=0)
    """Replicas at least; 0: the last one goes when nobody asks, and the next request starts one. None = `count`."""
    max: int | None = Field(default=None, ge=1)
    """Replicas at most. None = the greater of `count` and `min`."""

    max_surge_percent: int = Field(default=0, ge=0, le=100)
    """While an upgrade replaces them: replicas beyond their number that may run, in percent of it, if there is room. 0 = an old one
    ends before a new one starts, which takes no more GPUs; a single replica then pauses for as long as it loads."""

    @model_validator(mode="after")
    def _are_in_order(self) -> "ReplicasSettings":
        if not self.least <= self.initial <= self.most or self.most < 1:
            raise ValueError(f"min={self.least}, count={self.initial}, max={self.most} must be in this order, and max at least 1")
        return self

    @property
    def initial(self) -> int:
        return self.count if self.count is not None else self.min if self.min is not None else 1

    @property
    def least(self) -> int:
        return self.initial if self.min is None else self.min

    @property
    def most(self) -> int:
        return max(self.initial, self.least) if self.max is None else self.max

    @property
    def most_at_once(self) -> int:
        """While an upgrade replaces them."""
        return self.most + -(-self.most * self.max_surge_percent // 100)

    @property
    def vary(self) -> bool:
        return self.least != self.most


class FrontsSettings(Section):
    """The processes that speak HTTP and gRPC with clients."""

    count: int = Field(default=1, ge=1)
    """Fronts. Each can stand in for another; on a cluster two of them survive the loss of a host."""
    host_resource: str | None = Field(default=None, min_length=1)
    """Only hosts whose Ray was started with this resource (`ray start --resources`)."""


class HttpSettings(Section):
    """Where the HTTP front listens."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every one."""
    port: int = Field(default=8000, ge=1, le=65535)
    """TCP port."""
    strict: bool = False
    """Refuse a request with a field that has no effect here; otherwise a header of the answer names it."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of web pages whose scripts may ask this server (CORS), as ["https://chat.example.org"], or ["*"] for all. By default no
    page's: any that somebody opens on this machine could otherwise use the model."""
    slow_client_timeout_s: float = Field(default=60.0, ge=0.1, le=86_400)
    """A client that reads nothing for so long of what waits for it is left, and its request ends. Over gRPC of a stream only, once the
    connection's windows are full."""


class GrpcSettings(Section):
    """Where the gRPC front listens."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every one."""
    port: int = Field(default=9000, ge=1, le=65535)
    """TCP port."""
    reflection: bool = True
    """Whether tools such as grpcurl can ask which methods there are."""
    certificate: str | None = None
    """PEM file with the server's certificate chain: the port then speaks TLS. Read again when it changes. None = in the clear."""
    key: str | None = None
    """PEM file with the certificate's private key."""
    client_ca: str | None = None
    """PEM file with the authorities that clients' certificates must come from (mutual TLS). None = clients need no certificate."""

    @model_validator(mode="after")
    def _tls_is_whole(self) -> "GrpcSettings":
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key need each other; give both or neither")
        if self.client_ca is not None and self.certificate is None:
            raise ValueError("client_ca needs certificate and key: only a TLS port can ask clients for a certificate")
        return self

    @property
    def tls(self) -> dict[str, str | None]:
        """File by role; all None where the port is in the clear."""
        return {"certificate": self.certificate, "key": self.key, "client_ca": self.client_ca}

    @property
    def scheme(self) -> str:
        """Of an endpoint as the client library writes it."""
        return "grpcs" if self.certificate else "grpc"


class AuthSettings(Section):
    """Who may use the server."""

    keys_file: str | None = None
    """File of API keys, made by `manta keys`; it is on the host of every front, and looked at again every second. With it both
    fronts ask for a key, except for /livez, /readyz and gRPC health. null = whoever reaches the server may use it."""


class ToolsSettings(Section):
    """How tools are spoken of to the model."""

    protocol: ProtocolName = "auto"
    """"qwen_agent" (what Qwen2 was trained on), "hermes" (Qwen2.5, Hermes), or "auto": hermes where the model's vocabulary or chat
    template knows <tool_call>, else qwen_agent."""


class TracingSettings(Section):
    """OpenTelemetry traces of requests. They hold counts and times, never what clients wrote."""

    otlp_endpoint: str | None = Field(default=None, min_length=1)
    """Where spans go, by OTLP over HTTP: http://collector:4318/v1/traces. null = nowhere. Needs `pip install manta[otel]`."""
    ratio: float = Field(default=1.0, ge=0.0, le=1.0)
    """Of the requests that are traced."""


class LoggingSettings(Section):
    """What the server writes to its log. Prompts and answers never are."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least grave messages that are written."""
    format: Literal["text", "json"] = "text"
    """Lines for people, or a JSON object a line for programs: of the command itself, the fronts and the replicas."""


class RaySettings(Section):
    """The Ray cluster that the server runs on."""

    address: str | None = None
    """"local" starts a Ray of its own and ends it with the server; "auto" joins the one that runs on this host; or the host:port of
    its head. None = inside a Ray job the cluster of the job, else local. Tokens are Ray's affair: RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH."""
    app: str = Field(default="manta", pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """Name of the application on a cluster."""
    send_code: bool = False
    """Send this checkout of Manta to the hosts of a cluster that have none, or another version."""
    namespace: str = "manta"
    """Ray namespace of the server's actors."""
    temp_dir: str | None = None
    """Where a local Ray keeps sockets and logs; a short path. None = a folder of its own, removed in the end."""
    num_cpus: float | None = Field(default=None, gt=0)
    """CPUs that a local Ray believes to have. None = enough for the replicas, whatever the host has."""
    object_store_bytes: int = Field(default=256 * 1024 * 1024, ge=80 * 1024 * 1024)
    """Shared memory of a local Ray's object store; no tokens or weights pass through it."""
    dashboard: bool = False
    """Start Ray's dashboard with a local Ray."""


class ModelEntry(Section):
    """One of several models: the sections that are a model's own. What an entry leaves out is as at the top level."""

    model: ModelSettings = ModelSettings()
    parallel: ParallelSettings = ParallelSettings()
    replicas: ReplicasSettings = ReplicasSettings()
    autoscaling: AutoscalingConfig = AutoscalingConfig()
    engine: EngineConfig = EngineConfig()
    runner: RunnerConfig = RunnerConfig()
    resources: RankResources = RankResources()
    replica: ReplicaConfig = ReplicaConfig()

    @model_validator(mode="after")
    def _speculation_is_whole(self) -> "ModelEntry":
        draft_model_of(self.engine, self.runner)
        return self


class ServeConfig(Section):
    """Settings of a Manta server."""

    model: ModelSettings = ModelSettings()
    parallel: ParallelSettings = ParallelSettings()
    replicas: ReplicasSettings = ReplicasSettings()
    autoscaling: AutoscalingConfig = AutoscalingConfig()
    engine: EngineConfig = EngineConfig()
    runner: RunnerConfig = RunnerConfig()
    resources: RankResources = RankResources()
    replica: ReplicaConfig = ReplicaConfig()
    models: tuple[ModelEntry, ...] = ()
    """Several models side by side, each with its own engines; none = the one that the section `model` names. An entry may have
    any of the sections above, and overrides single settings of theirs."""
    router: RouterConfig = RouterConfig()
    fronts: FrontsSettings = FrontsSettings()
    http: HttpSettings = HttpSettings()
    grpc: GrpcSettings = GrpcSettings()
    limits: Limits = Limits()
    tools: ToolsSettings = ToolsSettings()
    auth: AuthSettings = AuthSettings()
    logging: LoggingSettings = LoggingSettings()
    tracing: TracingSettings = TracingSettings()
    ray: RaySettings = RaySettings()

    @model_validator(mode="after")
    def _speculation_is_whole(self) -> "ServeConfig":
        if not self.models:
            draft_model_of(self.engine, self.runner)
        return self

    def each_model(self) -> "tuple[ServeConfig, ...]":
        """For every model the settings of a server that has only this one."""
        if not self.models:
            return (self,)
        return tuple(
            self.model_copy(update={"models": (), **{section: getattr(entry, section) for section in ModelEntry.model_fields}})
            for entry in self.models
        )

    @model_validator(mode="before")
    @classmethod
    def _entries_have_the_top_levels_settings(cls, data: Any) -> Any:
        """Complete every entry from the sections beside the list."""
        if not isinstance(data, Mapping) or not isinstance(data.get("models"), list | tuple):
            return data
        beside = {name: _settings_in(data[name]) for name in ModelEntry.model_fields if name != "model" and name in data}
        return {**data, "models": [_completed(entry, beside) for entry in data["models"]]}

    @model_validator(mode="after")
    def _models_can_be_told_apart(self) -> "ServeConfig":
        if self.models and self.model != ModelSettings():
            raise ValueError("with a list of models each entry has its own section model; leave out the one beside the list")
        labels = [entry.model.name or entry.model.adapter or entry.model.source for entry in self.models]
        for label in sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"two models are called {label!r}; give each its own model.name")
        return self

    @model_validator(mode="after")
    def _fronts_do_not_collide(self) -> "ServeConfig":
        if self.http.port == self.grpc.port:
            raise ValueError(f"http.port and grpc.port are both {self.http.port}; choose two")
        return self


def _settings_in(section: Any) -> Any:
    """A section as a mapping, whatever it was given as; what is none of the three is for the check of types to refuse."""
    if isinstance(section, BaseModel):
        return section.model_dump()
    if dataclasses.is_dataclass(section) and not isinstance(section, type):
        return {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    return section


def _completed(entry: Any, beside: Mapping[str, Any]) -> Any:
    entry = _settings_in(entry)
    if not isinstance(entry, Mapping):
        return entry
    own = {name: _settings_in(section) for name, section in entry.items()}
    both = {name for name in own.keys() & beside.keys() if isinstance(own[name], Mapping) and isinstance(beside[name], Mapping)}
    return {**beside, **own, **{name: {**beside[name], **own[name]} for name in both}}
