"""Place 4 of a request, after a loss: whether it may be tried on another replica, and the counters of that."""

import hashlib
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from cluster.config import RouterConfig
from cluster.errors import ReplicaLost, ResumesExhausted
from cluster.replica_link import LinkLost
from engine.errors import EngineError, PoisonedRequest
from engine.plan import TokenEvent
from engine.request import Request

logger = logging.getLogger(__name__)

MAX_DEATHS = 2
"""After so many deaths of a replica's own process while it computed the request, the request is blamed and not tried again."""
MAX_LOSSES = 3
"""After so many losses of replicas and of their workers, taken together, the request is blamed. For a request that got no token in any
attempt the limit is `MAX_DEATHS`: telling its client to try again would be wrong."""
LOSS_REASONS = {"WorkersLost": "ranks_lost", "RecoveryGivenUp": "ranks_lost", "EngineStopped": "stopped"}
"""Error kinds caused by the replica, not by the request, with the reason for counters. Another replica may succeed."""
RETRIED_ONCE = {"InvalidLogits": "invalid_logits"}
"""Error kinds whose cause may be a faulty device, or a prompt for which the model computes NaN. Such a request is retried once."""
MAX_QUARANTINED = 4_096
"""Requests kept in quarantine; beyond that the oldest are dropped."""


@dataclass(frozen=True)
class MetricSample:
    """The value of one counter for the metrics page."""

    name: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()


class ResumeCounts:
    """Counters of streams that lost their replica."""

    def __init__(self) -> None:
        self.resumes: Counter[str] = Counter()
        """Attempts after the first, by the reason of the loss before them (`LinkLost.reason`)."""
        self.refused: Counter[str] = Counter()
        """Streams that were ended instead, by reason: poisoned, quarantined, attempts, budget."""
        self.tokens_replayed = 0
        """Committed tokens that a later attempt had to prefill again."""

    def samples(self) -> Iterator[MetricSample]:
        """The counters, without the types of a metrics library."""
        for reason, count in sorted(self.resumes.items()):
            yield MetricSample("resumes_total", count, (("reason", reason),))
        for reason, count in sorted(self.refused.items()):
            yield MetricSample("resume_refused_total", count, (("reason", reason),))
        yield MetricSample("tokens_replayed_total", self.tokens_replayed)


class Quarantine:
    """Requests that ended workers or replicas. They are refused for some time, also when a client sends them again."""

    def __init__(self, *, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds, self._clock = seconds, clock
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def add(self, request: Request) -> None:
        self._until[fingerprint(request)] = self._clock() + self._seconds
        while len(self._until) > MAX_QUARANTINED:
            self._until.popitem(last=False)

    def __contains__(self, request: Request) -> bool:
        if not self._until:  # the usual case; it saves hashing the prompt
            return False
        key = fingerprint(request)
        if self._until.get(key, 0.0) > self._clock():
            return True
        self._until.pop(key, None)
        return False

    def __len__(self) -> int:
        return len(self._until)


def fingerprint(request: Request) -> bytes:
    """A hash that is the same when a client sends a request again: it leaves out its id, its seed and the committed tokens."""
    sampling = replace(request.sampling, seed=0)
    return hashlib.sha256(repr((request.salt, request.prompt, sampling)).encode()).digest()


class ResumeBudget:
    """At most so many resumes within a window, so that a failing cluster is not also flooded with resumed streams."""

    def __init__(self, *, resumes: int, window_s: float, clock: Callable[[], float]) -> None:
        self._resumes, self._window_s, self._clock = resumes, window_s, clock
        self._spent: deque[float] = deque()

    def take(self) -> bool:
        now = self._clock()
        while self._spent and now - self._spent[0] >= self._window_s:
            self._spent.popleft()
        if len(self._spent) >= self._resumes:
            return False
        self._spent.append(now)
        return True


class ResumePolicy:
    """Decides for all requests of a front whether they may be resumed after a loss."""

    def __init__(self, config: RouterConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self.counts = ResumeCounts()
        self.quarantine = Quarantine(seconds=config.quarantine_s, clock=clock)
        self._budget = ResumeBudget(resumes=config.max_resumes, window_s=config.resume_window_s, clock=clock)

    def admit(self, request: Request) -> "LossHistory":
        """The loss history of a new request.

        Raises:
            PoisonedRequest: it is in quarantine.
        """
        if request in self.quarantine:
            self.counts.refused["quarantined"] += 1
            raise PoisonedRequest("this request ended the workers that computed it before; it is not tried again for some time")
        return LossHistory(request)

    def record_poisoned(self, request: Request) -> None:
        """Quarantine a request that an engine reported as poisoned."""
        self.counts.refused["poisoned"] += 1
        self.quarantine.add(request)

    def allow(self, history: "LossHistory", loss: LinkLost, num_committed: int) -> None:
        """Record a loss; raise if the request may not be tried again.

        Raises:
            PoisonedRequest, ReplicaLost, ResumesExhausted
        """
        if loss.reason in RETRIED_ONCE.values():  # happens once per request, and nothing was lost: it costs no attempt and no budget
            history.record_retry(loss)
            self.counts.resumes[loss.reason] += 1
            self.counts.tokens_replayed += num_committed
            return
        history.record_loss(loss, num_committed)
        request = history.request
        logger.warning("request %s choice %d: loss %d: %s", request.id, request.choice, len(history.lost_by), loss)
        losses, is_exhausted = history.losses, history.attempts_without_token >= self._config.max_attempts
        if history.deaths >= MAX_DEATHS or losses >= (MAX_DEATHS if is_exhausted else MAX_LOSSES):
            self.quarantine.add(request)
            raise self._refused("poisoned", PoisonedRequest(f"{losses} replicas were lost while they ran it; it is not tried again"))
        if is_exhausted:
            raise self._refused("attempts", ReplicaLost(attempts=history.attempts_without_token, last=str(loss)))
        if not self._budget.take():
            raise self._refused("budget", ResumesExhausted(resumes=self._config.max_resumes, window_s=self._config.resume_window_s))
        self.counts.resumes[loss.reason] += 1
        self.counts.tokens_replayed += num_committed

    def _refused(self, why: str, error: EngineError) -> EngineError:
        self.counts.refused[why] += 1
        return error


class LossHistory:
    """The losses of one request."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.lost_by: list[str] = []
        """Ids of the replicas that lost it, one per attempt."""
        self._retried: set[str] = set()
        """Reasons for which it was retried once."""
        self.attempts_without_token = 0
        """Consecutive attempts that gave no token. An attempt that gave one made progress, whatever ended it."""
        self._num_committed = len(request.committed)
        self.deaths = 0
        """Replica processes that died while they computed it."""
        self.losses = request.losses
        """Replicas and workers that were lost while they computed it. Losses of workers are reported by the engine, which does not count
        requests that were only waiting."""
        self.lost_host: str | None = None
        """The host, if the last loss was that of a host."""

    def record_engine_losses(self, losses: int) -> None:
        """An engine reported how often workers were lost while they computed it, earlier attempts included."""
        self.losses = max(self.losses, losses)

    def check_event(self, event: TokenEvent, replica_id: str, num_committed: int) -> None:
        """Check an event that a replica sent after ``num_committed`` committed tokens.

        Raises:
            LinkLost: the stream should go on at another replica.
        """
        self.record_engine_losses(event.losses)
        if (reason := self._reason_to_leave(event)) is not None:
            raise LinkLost(replica_id, event.error_message or "", reason=reason)
        if event.offset != num_committed:
            raise LinkLost(replica_id, f"sent offset {event.offset} where {num_committed} was due", reason="out_of_order")

    def _reason_to_leave(self, event: TokenEvent) -> str | None:
        """Why to try another replica, in one word; None if another replica would answer the same."""
        if event.error_kind is None:
            return None
        reason = RETRIED_ONCE.get(event.error_kind)
        return reason if reason is not None and reason not in self._retried else LOSS_REASONS.get(event.error_kind)

    def record_retry(self, loss: LinkLost) -> None:
        """Another replica is asked as well, or the same one again if there is no other."""
        self.lost_by.append(loss.replica_id)
        self._retried.add(loss.reason)

    def record_loss(self, loss: LinkLost, num_committed: int) -> None:
        self.lost_by.append(loss.replica_id)
        self.attempts_without_token = 0 if num_committed > self._num_committed else self.attempts_without_token + 1
        self._num_committed = num_committed
        self.deaths += loss.died
        self.losses += loss.died
        self.lost_host = loss.host
