"""Decides how many replicas a model should have, from queued work, running requests, KV cache usage and times to first token.

Pure functions of the demand and the time. This module is pickled by value into Ray Serve's controller, where Manta may not be installed,
so it imports nothing of Manta.
"""

import math
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

RATE_WINDOW_S = (10.0, 60.0)
"""Least and most seconds over which the arrival rate is measured; in between it is half a cold start. A decision that takes minutes to have
an effect must not depend on the last seconds."""
MIN_RATE_WINDOW_S = 1.0
TTFT_WINDOW_S = 30.0
"""Window of the fronts' times to first token."""
TARGET_UTILIZATION = 0.8
"""Fraction of a replica's throughput that it should be used for in the long run."""
SCALE_DOWN_HEADROOM = 1.25
"""A replica is removed only if the others could take this many times the recent load."""
MAX_KV_DEMAND = 4.0
"""Limit for the estimated KV demand of a replica, in multiples of its usage: what waiting requests will need is a guess."""
DEFAULT_COLD_START_S = 30.0
"""Assumed until a cold start has been measured."""


@dataclass(frozen=True, kw_only=True)
class AutoscalingConfig:
    """When replicas are added and removed, if `replicas.min` and `replicas.max` differ."""

    ttft_target_s: float = 2.0
    """Target for p90 of the time to the first token; replicas are added to keep it."""
    kv_target: float = 0.85
    """Target for the mean share of KV blocks that running and waiting requests need."""
    running_target: float = 0.8
    """Target for the mean number of running and waiting requests, as a share of `engine.max_running`."""
    scale_down_after_s: float = 120.0
    """A replica is removed when it was not needed for this long, and for at least twice the time that a start takes."""
    scale_to_zero_after_s: float = 600.0
    """With `replicas.min` 0, the last replica is removed after this long without requests, and at least twice the time of a start."""
    hold_s: float = 900.0
    """Scale from zero: how long a request waits for the first replica to start."""
    max_held: int = 512
    """Scale from zero: maximum requests that wait in a front; further ones are rejected."""

    def __post_init__(self) -> None:
        for name in ("ttft_target_s", "hold_s", "max_held"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("kv_target", "running_target"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")
        if self.scale_down_after_s < 0 or self.scale_to_zero_after_s < 0:
            raise ValueError("scale_down_after_s and scale_to_zero_after_s must not be negative")


@dataclass(frozen=True, kw_only=True)
class ReplicaLoad:
    """The load that one ready replica reports."""

    id: str
    num_running: int = 0
    num_waiting: int = 0
    prefill_tokens: int = 0
    kv_used: float = 0.0
    computed_tokens: int = 0
    """Tokens computed since its engine started."""
    step_token_s: float = 0.0

    @property
    def num_requests(self) -> int:
        return self.num_running + self.num_waiting


@dataclass(frozen=True, kw_only=True)
class Demand:
    """The demand for one model."""

    replicas: tuple[ReplicaLoad, ...] = ()
    """The ready replicas."""
    num_held: int = 0
    """Requests held at fronts because no replica is ready."""
    held_tokens: int = 0
    num_asked: int = 0
    """Requests since the fronts started; a change shows requests that were over between two polls."""
    ttft_s: float | None = None
    """90th percentile of recent times to first token, without requests that were held; the worst front's."""

    @property
    def num_requests(self) -> int:
        return self.num_held + sum(replica.num_requests for replica in self.replicas)

    @property
    def queued_tokens(self) -> int:
        return self.held_tokens + sum(replica.prefill_tokens for replica in self.replicas)


@dataclass
class Decider:
    """Decides on the number of replicas. Keeps the recent need, the arrival rate and the time of a cold start."""

    config: AutoscalingConfig
    max_running: int
    """`engine.max_running` of one replica."""
    cold_start_s: float = DEFAULT_COLD_START_S
    """Seconds from the decision for a replica until it was ready, as last measured."""
    _samples: "deque[_Sample]" = field(default_factory=deque)
    _needs: deque[tuple[float, float]] = field(default_factory=deque)
    _first_decision: float | None = None
    _last_request: float = 0.0
    _num_asked: int = 0
    _last_growth: float = -math.inf
    """When a replica last became ready."""
    _raised: tuple[float, int] | None = None
    """While a new replica is awaited: when the target was raised, and how many replicas were ready then."""
    _token_s: float = 0.0
    """Seconds per token, the mean over the replicas; kept while there is none, to estimate the work of held requests."""

    def decide(self, demand: Demand, *, target: int, now: float, least: int, most: int) -> int:
        """The number of replicas that there should be, starting ones included. ``target``: the number decided before; ``now``: seconds of
        a monotonic clock; ``least`` and ``most``: the limits."""
        if self._first_decision is None:
            self._first_decision = self._last_request = now
        self._measure_cold_start(demand, target, now)
        self._measure_speed(demand)
        rate = self._arriving_work(demand, now)
        need = max(
            self._need_by_work(demand, rate),
            self._need_by_requests(demand),
            self._need_by_kv(demand),
            self._need_by_ttft(demand, target, now),
        )
        self._record_need(need, demand, now)
        wanted = target
        if need > target:
            wanted = math.ceil(need)
        elif (recent := self._recent_need(now)) < target:
            wanted = max(recent, 1)
        if target <= 1 and self._is_unused(now):
            wanted = 0
        elif demand.num_requests:
            wanted = max(wanted, 1)
        wanted = min(max(wanted, least), most)
        if wanted > target and self._raised is None:
            self._raised = (now, len(demand.replicas))
        return wanted

    # --- how many replicas are needed, by one measure each

    def _need_by_work(self, demand: Demand, rate: float) -> float:
        """Replicas to compute what arrives, and to work off the queue by the time a new replica could help and the target TTFT."""
        return rate / TARGET_UTILIZATION + demand.queued_tokens * self._token_s / (self.config.ttft_target_s + self.cold_start_s)

    def _need_by_requests(self, demand: Demand) -> float:
        return demand.num_requests / (self.max_running * self.config.running_target)

    def _need_by_kv(self, demand: Demand) -> float:
        wanted = (r.kv_used * min(1 + r.num_waiting / max(r.num_running, 1), MAX_KV_DEMAND) for r in demand.replicas)
        return sum(wanted) / self.config.kv_target

    def _need_by_ttft(self, demand: Demand, target: int, now: float) -> float:
        """More replicas if times to first token exceed the target. Only once all replicas of the target have been ready for a while."""
        settled = len(demand.replicas) >= target and now - self._last_growth > TTFT_WINDOW_S
        if not settled or demand.ttft_s is None or not any(r.num_waiting or r.prefill_tokens for r in demand.replicas):
            return 0.0
        error = demand.ttft_s / self.config.ttft_target_s
        return target * min(error, 1.5) if error > 1 else 0.0

    # --- measurements over time

    def _measure_speed(self, demand: Demand) -> None:
        measured = [replica.step_token_s for replica in demand.replicas if replica.step_token_s]
        if measured:
            self._token_s = sum(measured) / len(measured)

    def _arriving_work(self, demand: Demand, now: float) -> float:
        """Work that arrives per second, in seconds of one replica: what was computed, plus the growth of the queue."""
        sample = _Sample(now, demand.queued_tokens, {r.id: (r.computed_tokens, r.step_token_s) for r in demand.replicas})
        window_s = min(max(self.cold_start_s / 2, RATE_WINDOW_S[0]), RATE_WINDOW_S[1])
        while self._samples and now - self._samples[0].time > window_s:
            self._samples.popleft()
        before = self._samples[0] if self._samples else sample
        if not self._samples or now - self._samples[-1].time >= window_s / 20:
            self._samples.append(sample)
        seconds = now - before.time
        if seconds < MIN_RATE_WINDOW_S:
            return 0.0
        computed = sum(
            max(tokens - before.computed[name][0], 0) * token_s
            for name, (tokens, token_s) in sample.computed.items()
            if name in before.computed
        )
        return max(computed + (sample.queued_tokens - before.queued_tokens) * self._token_s, 0.0) / seconds

    def _record_need(self, need: float, demand: Demand, now: float) -> None:
        if demand.num_requests or demand.num_asked != self._num_asked:
            self._last_request, self._num_asked = now, demand.num_asked
        while self._needs and self._needs[-1][1] <= need:  # keep only values that can be the maximum of a later window
            self._needs.pop()
        self._needs.append((now, need))
        while self._needs[0][0] < now - self._patience_s(self.config.scale_down_after_s):
            self._needs.popleft()

    def _recent_need(self, now: float) -> int:
        """Replicas that would have been enough for the highest recent need, with headroom."""
        assert self._first_decision is not None
        if now - self._first_decision < self._patience_s(self.config.scale_down_after_s):
            return sys.maxsize
        return math.ceil(self._needs[0][1] * SCALE_DOWN_HEADROOM - 1e-9)

    def _is_unused(self, now: float) -> bool:
        return now - self._last_request >= self._patience_s(self.config.scale_to_zero_after_s)

    def _patience_s(self, configured_s: float) -> float:
        return max(configured_s, 2 * self.cold_start_s)

    def _measure_cold_start(self, demand: Demand, target: int, now: float) -> None:
        if self._raised is None:
            return
        begun, num_before = self._raised
        if len(demand.replicas) > num_before:
            self.cold_start_s = max(now - begun, 0.5)
            self._raised, self._last_growth = None, now
        elif target <= num_before:
            self._raised = None


@dataclass(frozen=True)
class _Sample:
    time: float
    queued_tokens: int
    computed: Mapping[str, tuple[int, float]]


def parse_demand(reply: Mapping[str, Sequence[Mapping[str, object]]]) -> Demand:
    """The demand from the plain values that the directory returns; see `cluster.directory.Register.demand`."""
    fronts = reply["fronts"]
    ttfts = [float(str(front["ttft_s"])) for front in fronts if front["ttft_s"] is not None]
    return Demand(
        replicas=tuple(ReplicaLoad(**replica) for replica in reply["replicas"]),  # type: ignore[arg-type]
        num_held=sum(int(str(front["num_held"])) for front in fronts),
        held_tokens=sum(int(str(front["held_tokens"])) for front in fronts),
        num_asked=sum(int(str(front["num_asked"])) for front in fronts),
        ttft_s=max(ttfts, default=None),
    )
