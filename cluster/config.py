"""Settings of placement, liveness, recovery and routing."""

from dataclasses import dataclass
from typing import Literal

STARVATION_FACTOR = 4
"""How many times `RouterConfig.stall_timeout_s` a stream waits for a token while its replica serves other streams."""
SLOW_STEP_FACTOR = 4
"""How many times as long as usual a step may take before the replica counts as stalled."""


def _must_be_positive(config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")


@dataclass(frozen=True, kw_only=True)
class RankResources:
    """Resources that Ray reserves for each rank of a replica."""

    cpus: float = 1.0
    """CPUs per rank."""
    gpus: float | None = None
    """GPUs per rank. None = 1 if the Ray cluster has GPUs, else 0 (the demo model runs on CPUs)."""
    one_host: bool = False
    """Place all ranks of a replica on one host. Otherwise Ray packs them as tightly as it can."""
    ranks_per_host: int | None = None
    """Number of consecutive ranks that share a host, for a tensor-parallel group that spans hosts: the GPUs of one host. None = the ranks
    of a tensor-parallel group (and those that share an expert) share a host; stages and data-parallel groups may be on several."""
    host_resource: str | None = None
    """Use only hosts whose Ray was started with this resource (`ray start --resources`), for example to keep a model on one kind of
    host. None = any host."""

    def __post_init__(self) -> None:
        if self.cpus < 0 or (self.gpus or 0) < 0:
            raise ValueError(f"a rank cannot have {self.cpus} CPUs and {self.gpus} GPUs")
        if self.ranks_per_host is not None and self.ranks_per_host < 1:
            raise ValueError(f"ranks_per_host must be at least 1, got {self.ranks_per_host}")


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig:
    """How a replica monitors and restarts its ranks, and how it communicates with the fronts."""

    start_timeout_s: float = 1800.0
    """A rank that reports no loading progress for this long is considered lost."""
    first_step_timeout_s: float = 300.0
    """Timeout of the first step after a start, in which kernels may be compiled."""
    step_timeout_s: float = 60.0
    """Timeout of every later step; it detects ranks that hang."""
    canary_every_s: float = 3.0
    """An idle replica computes one token this often, to check that all its ranks still respond."""
    progress_timeout_s: float = 6.0
    """A busy replica that completes no step for this long, and for `SLOW_STEP_FACTOR` times its usual step time, is not ready."""
    freeze_timeout_s: float = 4.0
    """A rank on the replica's host whose process is stopped for this long is considered lost."""
    host_silence_s: float = 6.0
    """Ranks on another host that are silent for this long are considered lost; such ranks exit if they do not hear from their replica."""
    canary_timeout_s: float = 5.0
    """An idle replica whose check (`canary_every_s`) takes longer than this is not ready."""
    max_restarts: int = 3
    """Maximum restarts of the ranks within `restart_window_s`; after that the replica gives up."""
    restart_window_s: float = 600.0
    """Time window for `max_restarts`."""
    restart_backoff_s: float = 0.5
    """Delay before the second restart within the window; it doubles with every further restart."""
    heartbeat_s: float = 1.0
    """Interval at which a replica reports to the directory and answers its fronts."""
    front_silence_s: float = 10.0
    """A front that is silent for this long is considered gone, and its requests are cancelled."""
    drain_timeout_s: float = 30.0
    """How long a stopping replica waits for its running requests, and a stopped server for all of them."""
    other_hosts: bool = True
    """Also listen for fronts on other hosts (TCP on the node's own address, encrypted and authenticated by CURVE). A server with a private
    Ray never does."""

    def __post_init__(self) -> None:
        _must_be_positive(
            self,
            "start_timeout_s",
            "first_step_timeout_s",
            "step_timeout_s",
            "canary_every_s",
            "canary_timeout_s",
            "progress_timeout_s",
            "freeze_timeout_s",
            "host_silence_s",
            "restart_window_s",
            "heartbeat_s",
            "front_silence_s",
        )
        if self.max_restarts < 0 or self.restart_backoff_s < 0 or self.drain_timeout_s < 0:
            raise ValueError("max_restarts, restart_backoff_s and drain_timeout_s must not be negative")


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How a front chooses replicas, and moves streams when one is lost."""

    policy: Literal["expected_wait", "least_loaded", "round_robin"] = "expected_wait"
    """expected_wait: the replica with the earliest expected first token, considering prefix caches; least_loaded: the one with the fewest
    requests; round_robin: each in turn."""
    session_worth_s: float = 0.5
    """A session stays on its replica as long as that is expected to take at most this much longer than on another."""
    max_indexed_blocks: int = 262_144
    """Maximum cached blocks per replica that a front tracks (about 100 bytes each). If a replica has more, none are tracked."""
    max_attempts: int = 3
    """Maximum consecutive attempts of a choice that yield no token."""
    ready_wait_s: float = 30.0
    """How long a request waits for a ready replica, at its start and after each loss."""
    refresh_s: float = 0.5
    """Interval for reading the directory of replicas."""
    ping_s: float = 1.0
    """Interval for pinging replicas."""
    stall_timeout_s: float = 30.0
    """If a replica gives no token to any of its streams for this long, they move to another. A single stream without tokens waits
    `STARVATION_FACTOR` times as long, because it may be queued."""
    max_resumes: int = 2_048
    """Maximum streams that a front moves to other replicas within `resume_window_s`."""
    resume_window_s: float = 60.0
    """Time window for `max_resumes`."""
    quarantine_s: float = 600.0
    """How long a request that crashed the replicas or workers computing it is rejected."""
    replica_silence_s: float = 6.0
    """A replica that is silent for this long is considered lost by the front."""
    max_buffered_tokens: int = 32_768
    """Maximum tokens of one choice that are buffered for a client that does not read; beyond that, the choice is cancelled."""

    def __post_init__(self) -> None:
        if self.session_worth_s < 0:
            raise ValueError(f"session_worth_s must not be negative, got {self.session_worth_s}")
        _must_be_positive(self, "max_indexed_blocks")
        _must_be_positive(self, "max_attempts", "ready_wait_s", "refresh_s", "ping_s", "replica_silence_s", "max_buffered_tokens")
        _must_be_positive(self, "stall_timeout_s", "max_resumes", "resume_window_s", "quarantine_s")
        if self.replica_silence_s <= self.ping_s:
            raise ValueError(f"replica_silence_s={self.replica_silence_s} must exceed ping_s={self.ping_s}")
