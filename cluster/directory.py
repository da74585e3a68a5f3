"""Place 4 of a request: the directory of replicas. A named Ray actor with soft state (entries expire), and its clients."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME

from cluster.channel import Address, KeyPair
from cluster.health import Loading, State
from engine.executor import Capacity
from engine.load_stats import LoadStats
from engine.stats import EngineStats

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

NAMESPACE = "manta"
DEMAND = "demand"
"""Topic on which fronts publish their demand for each model; see `cluster.admission_queue.AdmissionQueue.demand`."""
REFUSALS = "refusals"
"""Topic on which a replica publishes a `Refusal`; see `refusals`."""
EXPIRY_S = 10.0
"""A replica that has not reported for this long is removed."""
FRONT_TIMEOUT_S = 1.0
"""Timeout for the directory's answer to a front, which then goes on with its last answer."""
COMMAND_TIMEOUT_S = 5.0
"""Timeout for the directory's answer to a command such as `manta status`."""
HEAD_RESOURCE_SHARE = 0.001
"""Amount of Ray's resource that marks the head's host; so small that it is never used up."""


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    rank: int
    host: str
    pid: int
    read: LoadStats | None = None
    """What it read from the checkpoint, once its weights are loaded."""


@dataclass(frozen=True, kw_only=True)
class Load:
    num_running: int = 0
    num_waiting: int = 0
    kv_used: float = 0.0
    """Fraction of the KV blocks in use, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class ReplicaRecord:
    """What a replica reports about itself."""

    id: str
    model: str
    state: State
    reason: str = ""
    loading: Loading | None = None
    """Progress while the ranks start."""
    address: Address
    guest_keys: KeyPair | None = None
    """The CURVE keys that a front on another host must use to be let in."""
    capacity: Capacity | None = None
    load: Load = Load()
    stats: EngineStats | None = None
    """None until its engine runs."""
    host: str = ""
    pid: int = 0
    ranks: tuple[RankPlace, ...] = ()
    num_restarts: int = 0
    last_loss: str | None = None

    @property
    def ready(self) -> bool:
        return self.state is State.READY


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a replica cannot start on its hosts, so that trying again is useless."""

    why: str
    version: str
    """Version of the deployed application; while a new version starts, a replica of the old one may still publish refusals."""


class Register:
    """The directory's actor: records of replicas, and notes on named topics. Both expire unless they are renewed.

    Actors of another Manta version may call it, so its method names and plain values must not change.
    """

    def __init__(self, *, expiry_s: float = EXPIRY_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._expiry_s, self._clock = expiry_s, clock
        self._begun = clock()
        self._records: dict[str, tuple[float, ReplicaRecord]] = {}
        self._topics: dict[str, dict[str, tuple[float, Any]]] = {}

    def report(self, record: ReplicaRecord) -> None:
        self._records[record.id] = (self._clock(), record)

    def leave(self, replica_id: str) -> None:
        self._records.pop(replica_id, None)

    def records(self) -> tuple[bool, tuple[ReplicaRecord, ...]]:
        """Whether this actor has run long enough for every replica to have reported, and the records that it has."""
        self._records = self._fresh(self._records)
        return self._clock() - self._begun > self._expiry_s, tuple(record for _, record in self._records.values())

    def pin(self, topic: str, key: str, note: Any) -> int:
        """Put a note on a topic, where it expires unless it is renewed. Returns how many notes are there. See `cluster.peer_notes`."""
        self._topics.setdefault(topic, {})[key] = (self._clock(), note)
        return len(self.pinned(topic))

    def pinned(self, topic: str) -> dict[str, Any]:
        self._topics[topic] = self._fresh(self._topics.get(topic, {}))
        return {key: note for key, (_, note) in self._topics[topic].items()}

    def demand(self, model: str) -> dict[str, list[dict[str, Any]]]:
        """For the autoscaler, in plain values: the load of a model's replicas, and its demand at the fronts. See `cluster.autoscaling`."""
        loads = [
            {
                "id": record.id,
                "num_running": stats.num_running,
                "num_waiting": stats.num_waiting,
                "prefill_tokens": stats.prefill_tokens,
                "kv_used": stats.kv_used,
                "computed_tokens": stats.computed_tokens,
                "step_token_s": stats.step_token_s,
            }
            for record in self.records()[1]
            if record.model == model and record.state in (State.READY, State.RECOVERING) and (stats := record.stats) is not None
        ]
        return {"replicas": loads, "fronts": [note[model] for note in self.pinned(DEMAND).values() if model in note]}

    def _fresh(self, entries: dict[str, tuple[float, Value]]) -> dict[str, tuple[float, Value]]:
        now = self._clock()
        return {key: entry for key, entry in entries.items() if now - entry[0] <= self._expiry_s}


class DirectoryUnavailable(Exception):
    """The directory did not answer; the message says why."""


def directory_actor(app: str) -> Any:
    """Handle of the app's directory, which is created if need be. Ray restarts it without limit, and heartbeats refill it.

    It runs on the head's host, like Ray's GCS and Ray Serve's controller, so that only the loss of that host ends it. This asks the GCS
    and blocks for as long as the head is down; do not call it where that matters.
    """
    options = {
        "name": _actor_name(app),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "max_task_retries": 0,
        "num_cpus": 0,
        "resources": {HEAD_NODE_RESOURCE_NAME: HEAD_RESOURCE_SHARE},
    }
    return ray.remote(Register).options(**options).remote()


def _is_permanent(error: Exception) -> bool:
    """Whether the actor must be looked up again after this error. A restarted actor is found by Ray itself."""
    passing = (ray.exceptions.ActorUnavailableError, ray.exceptions.GetTimeoutError)
    return isinstance(error, ray.exceptions.RayError) and not isinstance(error, passing)


class DirectoryClient:
    """Asks the directory from an event loop without ever blocking it, even while hosts are down.

    The actor's handle is kept, because Ray itself finds a restarted actor. It is looked up again, in a thread, only after Ray says that the
    actor will not come back.
    """

    def __init__(self, app: str, *, find: Callable[[str], Any] = directory_actor, timeout_s: float = FRONT_TIMEOUT_S) -> None:
        self._app, self._find, self._timeout_s = app, find, timeout_s
        self._finding: asyncio.Future[Any] | None = None
        self._was_unavailable = False

    async def ask(self, method: str, *arguments: Any) -> Any:
        """Call ``method`` of `Register` and return its result.

        Raises:
            DirectoryUnavailable: no answer came in time.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                if self._finding is None:
                    self._finding = self._start_lookup()
                actor = await asyncio.shield(self._finding)
                answer = await getattr(actor, method).remote(*arguments)
        except Exception as error:  # Ray raises many types, one of which is also a TimeoutError
            found = self._finding
            if found is not None and found.done() and (found.exception() is not None or _is_permanent(error)):
                self._finding = None
            raise self._unavailable(str(error) or f"no answer within {self._timeout_s:g} s") from error
        self._was_unavailable = False
        return answer

    def _start_lookup(self) -> "asyncio.Future[Any]":
        """Look the actor up in a thread, where that may block for as long as the head is down."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[Any] = loop.create_future()

        def look() -> None:
            try:
                actor = self._find(self._app)
            except Exception as error:
                setter, outcome = found.set_exception, error
            else:
                setter, outcome = found.set_result, actor
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(setter, outcome)

        threading.Thread(target=look, name="directory-finder", daemon=True).start()
        return found

    def _unavailable(self, why: str) -> DirectoryUnavailable:
        if not self._was_unavailable:
            logger.warning("the directory does not answer, using its last answer: %s", why)
        self._was_unavailable = True
        return DirectoryUnavailable(why)


def current_records(app: str) -> tuple[ReplicaRecord, ...]:
    """The directory's records; none if it does not answer. For callers without an event loop."""
    try:
        _, records = ray.get(directory_actor(app).records.remote(), timeout=5)
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError, ValueError):
        return ()
    return tuple(records)


def refusals(app: str) -> dict[str, Refusal]:
    """Refusals of the last `EXPIRY_S` seconds, by replica id."""
    try:
        found: dict[str, Any] = ray.get(directory_actor(app).pinned.remote(REFUSALS), timeout=5)
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError, ValueError):
        return {}
    return {replica: refusal for replica, refusal in found.items() if isinstance(refusal, Refusal)}  # earlier versions published strings


def read_directory(app: str, topic: str) -> tuple[tuple[ReplicaRecord, ...], tuple[Any, ...]]:
    """The directory's records and the notes on one topic. Does not create a directory; both are empty if there is none.

    Raises:
        DirectoryUnavailable: it did not answer.
    """
    try:
        actor: Any = ray.get_actor(_actor_name(app), namespace=NAMESPACE)
    except ValueError:
        return (), ()
    except ray.exceptions.RayError as error:
        raise DirectoryUnavailable(str(error)) from error
    try:
        (_, records), notes = ray.get([actor.records.remote(), actor.pinned.remote(topic)], timeout=COMMAND_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        raise DirectoryUnavailable(f"no answer within {COMMAND_TIMEOUT_S:g} s") from None
    except ray.exceptions.RayError as error:
        raise DirectoryUnavailable(str(error)) from error
    return tuple(records), tuple(notes.values())


def apps_with_directories() -> tuple[str, ...]:
    """The deployed applications, found by the names of their directories' actors."""
    prefix = _actor_name("")
    named = ray.util.list_named_actors(all_namespaces=True)
    return tuple(sorted(actor["name"].removeprefix(prefix) for actor in named if actor["name"].startswith(prefix)))


def end_directory(app: str) -> None:
    """End an application's directory, once the application has been deleted."""
    try:
        ray.kill(ray.get_actor(_actor_name(app), namespace=NAMESPACE))
    except (ray.exceptions.RayError, ValueError):
        return


def _actor_name(app: str) -> str:
    return f"replica-directory:{app}"


class Reporter:
    """A replica's client: reports to the directory, and carries on while it is away."""

    def __init__(self, app: str, *, find: Callable[[str], Any] = directory_actor) -> None:
        self._app, self._find = app, find
        self._actor: Any = None
        self._finder: threading.Thread | None = None
        self._pending: Any = None

    def report(self, record: ReplicaRecord) -> None:
        """Report without waiting. While a report is pending no other is sent; the next one replaces it."""
        try:
            if self._pending is not None:
                done, _ = ray.wait([self._pending], timeout=0)
                if not done:
                    return
                self._pending = None
                ray.get(done[0])
            if self._actor is None:
                self._start_finding()
            else:
                self._pending = self._actor.report.remote(record)
        except (ray.exceptions.RayError, ValueError) as error:
            if not isinstance(error, ray.exceptions.ActorUnavailableError):
                self._actor = None
            logger.warning("cannot report to the directory: %s", error)

    def _start_finding(self) -> None:
        """Look the actor up in a thread: a heartbeat that waits for Ray's GCS would not notice what happens to the ranks."""
        if self._finder is None or not self._finder.is_alive():
            self._finder = threading.Thread(target=self._find_actor, name="directory-finder", daemon=True)
            self._finder.start()

    def _find_actor(self) -> None:
        try:
            self._actor = self._find(self._app)
        except (ray.exceptions.RayError, ValueError) as error:
            logger.warning("the directory cannot be found: %s", error)

    def refuse(self, replica_id: str, refusal: Refusal) -> None:
        """Publish why the replica cannot start, for whoever waits for it; Ray Serve knows only that a start failed, and tries again."""
        try:
            ray.get(directory_actor(self._app).pin.remote(REFUSALS, replica_id, refusal), timeout=2)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError, ValueError) as error:
            logger.warning("cannot publish a refusal in the directory: %s", error)

    def leave(self, replica_id: str) -> None:
        try:
            if self._actor is not None:
                ray.get(self._actor.leave.remote(replica_id), timeout=2)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            logger.warning("cannot report the end to the directory: %s", error)


class Reader:
    """A front's client: polls the directory, and keeps its last answer while the directory is away or has just restarted."""

    def __init__(self, app: str, *, model: str | None = None) -> None:
        """``model``: keep only the replicas of this model."""
        self._directory, self._model = DirectoryClient(app), model
        self._known: dict[str, ReplicaRecord] = {}

    @property
    def known(self) -> tuple[ReplicaRecord, ...]:
        return tuple(self._known.values())

    async def refresh(self) -> tuple[ReplicaRecord, ...]:
        with contextlib.suppress(DirectoryUnavailable):
            self.take(*await self._directory.ask("records"))
        return self.known

    def take(self, complete: bool, records: tuple[ReplicaRecord, ...]) -> None:
        """Take an answer: a complete one replaces what is known, an incomplete one is added to it."""
        answer = {record.id: record for record in records if self._model in (None, record.model)}
        self._known = answer if complete else self._known | answer
