"""All settings of a server, as a tree of sections. Some sections are frozen dataclasses of other packages, used as they are.

`serve.config_sources` reads settings from a YAML file, the environment and flags; `serve.config_docs` documents them. Pydantic checks
types here and runs each dataclass's own checks; no package below `serve/` depends on pydantic.
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
"""Fields that the server derives from the checkpoint; they are not settings."""


class Section(BaseModel):
    """Base class: frozen, rejects unknown keys, each field documented by the docstring below it (as in the other packages' dataclasses)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ModelSettings(Section):
    """The model to serve, and its name."""

    source: str = Field(default="demo", min_length=1)
    """Where the model is: a checkpoint folder, "demo", a Hugging Face repository (owner/name or hf://owner/name),
    modelscope://owner/name, or the URL of a folder in object storage (s3://bucket/folder, gs://bucket/folder, or another scheme that
    fsspec supports)."""
    name: str | None = Field(default=None, min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:/-]+$")
    """Model name that clients use. None = the repository id or folder name (the adapter's, if there is one)."""
    revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit on the hub. None = the hub's default."""
    adapter: str | None = Field(default=None, min_length=1)
    """A LoRA adapter in PEFT format, merged into the weights while they load: a folder, repository or URL, like `source`. The model
    then takes the adapter's name unless `name` is set. None = no adapter."""
    adapter_revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit of the adapter on the hub. None = the hub's default."""
    pooling: Literal["auto", "last", "mean", "first"] = "auto"
    """How embeddings are pooled: auto = as the model's files say (modules.json of sentence-transformers); or the normalised hidden
    state of the last or the first token, or the mean over all tokens."""

    @model_validator(mode="after")
    def _revisions_have_something(self) -> "ModelSettings":
        if self.adapter_revision is not None and self.adapter is None:
            raise ValueError("adapter_revision is set, but there is no adapter")
        return self


class ParallelSettings(Section):
    """How one replica is split over ranks."""

    tensor: int = 1
    """Tensor-parallel size: ranks that split attention heads, MLPs and the vocabulary. It need not divide the number of heads."""
    expert: int = 1
    """Expert-parallel size: groups of ranks that split the routed experts of a Qwen2-MoE. It must divide tensor x data."""
    pipeline: int = 1
    """Pipeline-parallel size: stages of consecutive layers."""
    data: int = 1
    """Data-parallel size: copies of the attention within one replica, each with its own sequences."""

    @model_validator(mode="after")
    def _forms_a_replica(self) -> "ParallelSettings":
        _ = self.topology  # raises InvalidTopology, a ValueError
        return self

    @property
    def topology(self) -> Topology:
        return Topology(tp=self.tensor, ep=self.expert, pp=self.pipeline, dp=self.data)


class ReplicasSettings(Section):
    """The number of replicas of the model. If `min` and `max` differ, it follows the load; see `autoscaling`."""

    count: int | None = Field(default=None, ge=0)
    """Initial number of replicas. None = `min` if it is set, else 1."""
    min: int | None = Field(default=None, ge=0)
    """Minimum number of replicas. 0 = scale to zero when there are no requests; the next request starts a replica. None = `count`."""
    max: int | None = Field(default=None, ge=1)
    """Maximum number of replicas. None = the greater of `count` and `min`."""

    max_surge_percent: int = Field(default=0, ge=0, le=100)
    """Extra replicas that may run during an upgrade, in percent of their number, if there is room. 0 = each old replica stops before
    its successor starts: this needs no extra GPUs, but a single replica is unavailable while the new one loads."""

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
        """Maximum number of replicas during an upgrade."""
        return self.most + -(-self.most * self.max_surge_percent // 100)

    @property
    def vary(self) -> bool:
        return self.least != self.most


class FrontsSettings(Section):
    """The processes that serve HTTP and gRPC to clients."""

    count: int = Field(default=1, ge=1)
    """Number of fronts. They are interchangeable; on a cluster, two fronts survive the loss of a host."""
    host_resource: str | None = Field(default=None, min_length=1)
    """Run fronts only on hosts whose Ray was started with this resource (`ray start --resources`). None = on any host."""


class HttpSettings(Section):
    """The HTTP API."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 = all addresses."""
    port: int = Field(default=8000, ge=1, le=65535)
    """TCP port."""
    strict: bool = False
    """Reject requests with fields that have no effect here. Otherwise a response header names such fields."""
    allowed_origins: tuple[str, ...] = ()
    """Web origins whose scripts may call this server (CORS), such as ["https://chat.example.org"], or ["*"] for all. None by default:
    otherwise any web page opened on this machine could use the model."""
    slow_client_timeout_s: float = Field(default=60.0, ge=0.1, le=86_400)
    """A client that reads nothing for this long while data waits for it is disconnected, and its request ends. On gRPC this applies
    to streams only, once the connection's flow-control windows are full."""


class GrpcSettings(Section):
    """The gRPC API."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 = all addresses."""
    port: int = Field(default=9000, ge=1, le=65535)
    """TCP port."""
    reflection: bool = True
    """Enable server reflection, which tools such as grpcurl use to list methods."""
    certificate: str | None = None
    """PEM file with the server's certificate chain; enables TLS. Reloaded when it changes. None = no TLS."""
    key: str | None = None
    """PEM file with the certificate's private key."""
    client_ca: str | None = None
    """PEM file with the CAs that must have issued client certificates (mutual TLS). None = clients need no certificate."""

    @model_validator(mode="after")
    def _tls_is_whole(self) -> "GrpcSettings":
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key need each other; give both or neither")
        if self.client_ca is not None and self.certificate is None:
            raise ValueError("client_ca needs certificate and key: only a TLS port can ask clients for a certificate")
        return self

    @property
    def tls(self) -> dict[str, str | None]:
        """Role to file; all None without TLS."""
        return {"certificate": self.certificate, "key": self.key, "client_ca": self.client_ca}

    @property
    def scheme(self) -> str:
        """URL scheme of the endpoint in the client library."""
        return "grpcs" if self.certificate else "grpc"


class AuthSettings(Section):
    """Access control."""

    keys_file: str | None = None
    """File of API keys, created by `manta keys`. It must exist on the host of every front and is checked for changes every second. With
    it, HTTP and gRPC require a key, except for /livez, /readyz and gRPC health. None = no authentication."""


class ToolsSettings(Section):
    """Tool calling."""

    protocol: ProtocolName = "auto"
    """Prompt format for tools: "qwen_agent" (what Qwen2 was trained on), "hermes" (Qwen2.5, Hermes), or "auto": hermes if the model's
    vocabulary or chat template has <tool_call>, else qwen_agent."""


class TracingSettings(Section):
    """OpenTelemetry traces of requests. They contain counts and times, never what clients wrote."""

    otlp_endpoint: str | None = Field(default=None, min_length=1)
    """OTLP/HTTP endpoint for spans, such as http://collector:4318/v1/traces. None = no tracing. Needs `pip install manta[otel]`."""
    ratio: float = Field(default=1.0, ge=0.0, le=1.0)
    """Fraction of requests to trace."""


class LoggingSettings(Section):
    """The server's log. It never contains prompts or answers."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Minimum level of messages."""
    format: Literal["text", "json"] = "text"
    """Plain text, or one JSON object per line. Applies to the command itself, the fronts and the replicas."""


class RaySettings(Section):
    """The Ray cluster that the server runs on."""

    address: str | None = None
    """Which Ray to use: "local" starts a private Ray and stops it with the server; "auto" joins the cluster that this host belongs to;
    or the host:port of a cluster's head. None = the job's cluster inside a Ray job, else local. Tokens are configured as for Ray itself:
    RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH."""
    app: str = Field(default="manta", pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """Application name on a cluster."""
    send_code: bool = False
    """Upload this checkout of Manta to the cluster's hosts, for hosts without Manta or with another version."""
    namespace: str = "manta"
    """Ray namespace of the server's actors."""
    temp_dir: str | None = None
    """Folder for a local Ray's sockets and logs; keep the path short. None = a temporary folder, removed at the end."""
    num_cpus: float | None = Field(default=None, gt=0)
    """Number of CPUs that a local Ray is told it has. None = enough for the replicas, whatever the host has."""
    object_store_bytes: int = Field(default=256 * 1024 * 1024, ge=80 * 1024 * 1024)
    """Shared memory of a local Ray's object store. Tokens and weights do not pass through it."""
    dashboard: bool = False
    """Start the dashboard of a local Ray."""


class ModelEntry(Section):
    """One of several models: the sections that belong to a model. Settings that an entry omits are taken from the top level."""

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
    """Several models served side by side, each with its own replicas; empty = only the one in section `model`. An entry may contain
    any of the sections above and overrides single settings in them."""
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
        """For each model, the settings of a server with this model only."""
        if not self.models:
            return (self,)
        return tuple(
            self.model_copy(update={"models": (), **{section: getattr(entry, section) for section in ModelEntry.model_fields}})
            for entry in self.models
        )

    @model_validator(mode="before")
    @classmethod
    def _entries_have_the_top_levels_settings(cls, data: Any) -> Any:
        """Fill in what entries omit from the top-level sections."""
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
    def _ports_differ(self) -> "ServeConfig":
        if self.http.port == self.grpc.port:
            raise ValueError(f"http.port and grpc.port are both {self.http.port}; choose two")
        return self


def _settings_in(section: Any) -> Any:
    """A section (pydantic model, dataclass or mapping) as a mapping. Anything else is returned as it is, for type checking to reject."""
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
