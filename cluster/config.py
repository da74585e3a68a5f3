"""Settings of placement, liveness, recovery and routing."""

from dataclasses import dataclass
from typing import Literal

STARVATION_FACTOR = 4
"""How many times `RouterConfig.stall_timeout_s` a stream waits while its replica serves others."""
SLOW_STEP_FACTOR = 4
"""How many times as long as usual a step may take before it is doubted."""


def _must_be_positive(config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")


@dataclass(frozen=True, kw_only=True)
class RankResources:
    """What Ray sets aside for each rank of a replica."""

    cpus: float = 1.0
    gpus: float | None = None
    """Of each rank. None = one where the Ray that serves has GPUs at all (the demo model computes on CPUs), else none."""
    one_host: bool = False
    """All ranks on one host or not at all; without it Ray packs them as tightly as it can."""
    ranks_per_host: int | None = None
    """Neighbouring ranks that share a host: the GPUs of one, for a tensor-parallel group that spans hosts. None = the ranks of a
    tensor-parallel group (and those that share an expert) share a host, stages and data-parallel groups may lie on several."""
    host_resource: str | None = None
    """Only hosts whose Ray was started with this resource (`ray start --resources`): keeps a model to one kind of host."""

    def __post_init__(self) -> None:
        if self.cpus < 0 or (self.gpus or 0) < 0:
            raise ValueError(f"a rank cannot have {self.cpus} CPUs and {self.gpus} GPUs")
        if self.ranks_per_host is not None and self.ranks_per_host < 1:
            raise ValueError(f"ranks_per_host must be at least 1, got {self.ranks_per_host}")


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig:
    """How a replica watches and restores its ranks, and how it talks to the fronts."""

    start_timeout_s: float = 1800.0
    """A rank that has not said anything new about loading for this long is lost."""
    first_step_timeout_s: float = 300.0
    """Deadline of the first step after a start: kernels may be compiled in it."""
    step_timeout_s: float = 60.0
    """Deadline of every later step; a rank that is frozen is seen by it."""
    canary_every_s: float = 3.0
    """A ready replica without work proves this often, by one token, that all its ranks still answer."""
    progress_timeout_s: float = 6.0
    """A replica at work that finishes no step for so long, and for `SLOW_STEP_FACTOR` times as long as its steps take, is not ready."""
    freeze_timeout_s: float = 4.0
    """A rank of this host whose process is stopped for so long is lost."""
    host_silence_s: float = 6.0
    """Ranks on another host that cannot be heard for so long are lost, and end by themselves if they cannot hear their replica."""
    canary_timeout_s: float = 5.0
    """A replica without other work that owes this proof for so long is not ready."""
    max_restarts: int = 3
    """Restarts of the ranks within `restart_window_s` before the replica is given up."""
    restart_window_s: float = 600.0
    restart_backoff_s: float = 0.5
    """Wait before the second restart within the window; doubled for every further one."""
    heartbeat_s: float = 1.0
    """How often a replica reports to the directory and answers its fronts."""
    front_silence_s: float = 10.0
    """A front not heard from for this long is gone: its requests are cancelled."""
    drain_timeout_s: float = 30.0
    """How long a replica that is asked to stop waits for its running requests."""
    other_hosts: bool = True
    """Listen for fronts of other hosts as well (TCP on the node's own address, encrypted and authenticated by CURVE). A server with
    a Ray of its own never does."""

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
    """How a front chooses replicas and outlives their loss."""

    policy: Literal["expected_wait", "least_loaded", "round_robin"] = "expected_wait"
    """expected_wait: where the first token comes soonest, prefix caches considered; else the fewest requests, or each in turn."""
    session_worth_s: float = 0.5
    """A session goes on where it was, as long as that is expected to take no more than so much longer than elsewhere."""
    max_indexed_blocks: int = 262_144
    """Cached blocks of one replica that a front remembers (about 100 bytes each); where there are more it remembers none."""
    max_attempts: int = 3
    """How often in a row a choice is handed to an engine at most without getting a token."""
    ready_wait_s: float = 30.0
    """How long a request waits for a ready replica, at the start and again after a loss."""
    refresh_s: float = 0.5
    """How often the directory is asked."""
    ping_s: float = 1.0
    stall_timeout_s: float = 30.0
    """A replica that gives none of its streams a token for so long is left by them; one stream alone that gets none while others
    do waits `STARVATION_FACTOR` times as long, as it may be in a queue."""
    max_resumes: int = 2_048
    """Streams that this front hands to another replica within `resume_window_s` at most."""
    resume_window_s: float = 60.0
    quarantine_s: float = 600.0
    """For how long a request that ended the replicas or workers that computed it is refused."""
    replica_silence_s: float = 6.0
    """A replica not heard from for this long is lost to this front."""
    max_buffered_tokens: int = 32_768
    """Tokens of one choice that wait for a client which does not read; beyond, the choice is cancelled."""

    def __post_init__(self) -> None:
        if self.session_worth_s < 0:
            raise ValueError(f"session_worth_s must not be negative, got {self.session_worth_s}")
        _must_be_positive(self, "max_indexed_blocks")
        _must_be_positive(self, "max_attempts", "ready_wait_s", "refresh_s", "ping_s", "replica_silence_s", "max_buffered_tokens")
        _must_be_positive(self, "stall_timeout_s", "max_resumes", "resume_window_s", "quarantine_s")
        if self.replica_silence_s <= self.ping_s:
            raise ValueError(f"replica_silence_s={self.replica_silence_s} must exceed ping_s={self.ping_s}")
