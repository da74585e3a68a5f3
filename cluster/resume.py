"""Step 4 of a request, after a loss: may it be tried again, and what is counted of it."""

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
"""A request present at so many deaths of a replica's own process may be what kills them; it is not tried again."""
MAX_LOSSES = 3
"""So many losses of replicas or of their workers, taken together, are too many for one request; for one that got no token in any of its
attempts `MAX_DEATHS` are, as "try again" would be the wrong word for it."""
LOSSES = {"WorkersLost": "ranks_lost", "RecoveryGivenUp": "ranks_lost", "EngineStopped": "stopped"}
"""Error kinds that say something about the replica, not about the request: another replica may do better. With the reason."""
RETRIED_ONCE = {"InvalidLogits": "invalid_logits"}
"""Error kinds that may be of either: of a sick device, or of a prompt for which the model has no numbers. They are doubted once."""
MAX_QUARANTINED = 4_096
"""Requests remembered as poisonous; the oldest make room."""


@dataclass(frozen=True)
class MetricSample:
    """One counter as a metrics page shows it."""

    name: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()


class ResumeCounts:
    """What happened to streams that lost their replica. Only grows."""

    def __init__(self) -> None:
        self.resumes: Counter[str] = Counter()
        """Attempts after the first, by the reason of the loss before them (`LinkLost.reason`)."""
        self.refused: Counter[str] = Counter()
        """Streams ended instead, by why: poisoned, quarantined, attempts, budget."""
        self.tokens_replayed = 0
        """Committed tokens that another attempt had to take in again."""

    def samples(self) -> Iterator[MetricSample]:
        """For a metrics page, without any library's types."""
        for reason, count in sorted(self.resumes.items()):
            yield MetricSample("resumes_total", count, (("reason", reason),))
        for reason, count in sorted(self.refused.items()):
            yield MetricSample("resume_refused_total", count, (("reason", reason),))
        yield MetricSample("tokens_replayed_total", self.tokens_replayed)


class Quarantine:
    """Requests that were the end of workers or replicas, refused at the door for a while: also when a client sends them again."""

    def __init__(self, *, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds, self._clock = seconds, clock
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def add(self, request: Request) -> None:
        self._until[fingerprint(request)] = self._clock() + self._seconds
        while len(self._until) > MAX_QUARANTINED:
            self._until.popitem(last=False)

    def __contains__(self, request: Request) -> bool:
        if not self._until:  # nearly always, and hashing a prompt is not free
            return False
        key = fingerprint(request)
        if self._until.get(key, 0.0) > self._clock():
            return True
        self._until.pop(key, None)
        return False

    def __len__(self) -> int:
        return len(self._until)


def fingerprint(request: Request) -> bytes:
    """What is the same when a client sends a request again: all but its id, its seed and what an earlier attempt gave."""
    sampling = replace(request.sampling, seed=0)
    return hashlib.sha256(repr((request.salt, request.prompt, sampling)).encode()).digest()


class ResumeBudget:
    """At most so many resumes within a window: a cluster that falls apart is not flooded with its own streams as well."""

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
    """What a front knows about losses over all its requests."""

    def __init__(self, config: RouterConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self.counts = ResumeCounts()
        self.quarantine = Quarantine(seconds=config.quarantine_s, clock=clock)
        self._budget = ResumeBudget(resumes=config.max_resumes, window_s=config.resume_window_s, clock=clock)

    def admit(self, request: Request) -> "LossHistory":
        """
        Raises:
            PoisonedRequest: it is in quarantine.
        """
        if request in self.quarantine:
            self.counts.refused["quarantined"] += 1
            raise PoisonedRequest("this request ended the workers that computed it before; it is not tried again for some time")
        return LossHistory(request)

    def note_poisoned(self, request: Request) -> None:
        """An engine found out by itself."""
        self.counts.refused["poisoned"] += 1
        self.quarantine.add(request)

    def allow(self, history: "LossHistory", loss: LinkLost, num_committed: int) -> None:
        """Note a loss, and raise if the request may not be tried again.

        Raises:
            PoisonedRequest, ReplicaLost, ResumesExhausted
        """
        if loss.reason in RETRIED_ONCE.values():  # at most once for a request, and no loss of anything: no attempts, no budget
            history.doubt(loss)
            self.counts.resumes[loss.reason] += 1
            self.counts.tokens_replayed += num_committed
            return
        history.add(loss, num_committed)
        request = history.request
        logger.warning("request %s choice %d: loss %d: %s", request.id, request.choice, len(history.lost_by), loss)
        losses, is_tired = history.losses, history.attempts_without_token >= self._config.max_attempts
        if history.deaths >= MAX_DEATHS or losses >= (MAX_DEATHS if is_tired else MAX_LOSSES):
            self.quarantine.add(request)
            raise self._refused("poisoned", PoisonedRequest(f"{losses} replicas were lost while they ran it; it is not tried again"))
        if is_tired:
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
        """Ids of the replicas it was lost by, one per attempt."""
        self._doubts: set[str] = set()
        self.attempts_without_token = 0
        """Attempts in a row that gave no token. One that did has brought the answer nearer to its end, whatever it was lost by."""
        self._num_committed = len(request.committed)
        self.deaths = 0
        """Replicas that died."""
        self.losses = request.losses
        """Replicas and workers that were lost while they computed it: of workers the engine says so, before its replica is left. Who only
        waited there is not to blame."""
        self.lost_host: str | None = None
        """Where the last loss was that of a host."""

    def told(self, losses: int) -> None:
        """An engine said how often workers were lost over it, those of earlier attempts included."""
        self.losses = max(self.losses, losses)

    def hear(self, event: TokenEvent, replica_id: str, num_committed: int) -> None:
        """What a replica says behind so many committed tokens.

        Raises:
            LinkLost: another replica may do better.
        """
        self.told(event.losses)
        if (reason := self._reason_to_leave(event)) is not None:
            raise LinkLost(replica_id, event.error_message or "", reason=reason)
        if event.offset != num_committed:
            raise LinkLost(replica_id, f"sent offset {event.offset} where {num_committed} was due", reason="out_of_order")

    def _reason_to_leave(self, event: TokenEvent) -> str | None:
        """In one word; None where another replica would say the same."""
        if event.error_kind is None:
            return None
        doubt = RETRIED_ONCE.get(event.error_kind)
        return doubt if doubt is not None and doubt not in self._doubts else LOSSES.get(event.error_kind)

    def doubt(self, loss: LinkLost) -> None:
        """What this replica said is heard from another one as well, or once more from this one where it is alone."""
        self.lost_by.append(loss.replica_id)
        self._doubts.add(loss.reason)

    def add(self, loss: LinkLost, num_committed: int) -> None:
        self.lost_by.append(loss.replica_id)
        self.attempts_without_token = 0 if num_committed > self._num_committed else self.attempts_without_token + 1
        self._num_committed = num_committed
        self.deaths += loss.died
        self.losses += loss.died
        self.lost_host = loss.host
