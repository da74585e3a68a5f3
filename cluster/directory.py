"""Step 4 of a request: which replicas there are. A named actor with soft state, and the copy that its readers keep."""

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

Kept = TypeVar("Kept")

NAMESPACE = "manta"
DEMAND = "demand"
"""The board on which fronts pin, for every model, what waits there; see `cluster.admission_queue.AdmissionQueue.demand`."""
REFUSALS = "refusals"
"""The board on which a replica pins a `Refusal`; see `refusals`."""
EXPIRY_S = 10.0
"""A replica that has not reported for this long is taken off."""
ANSWER_S = 1.0
"""How long the directory may take to answer a front, which then goes on with what it knows."""
LOOK_S = 5.0
"""How long it may take to answer somebody who looks."""
UNMEASURED = 0.001
"""Of Ray's mark on the head's host, which nobody counts."""


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    rank: int
    host: str
    pid: int
    read: LoadStats | None = None
    """Once its weights are there."""


@dataclass(frozen=True, kw_only=True)
class Load:
    num_running: int = 0
    num_waiting: int = 0
    kv_used: float = 0.0
    """Of the KV blocks, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class ReplicaRecord:
    """What a replica says about itself."""

    id: str
    model: str
    state: State
    reason: str = ""
    loading: Loading | None = None
    """While the ranks start."""
    address: Address
    guest_keys: KeyPair | None = None
    """What a front of another host must hold to be let in."""
    capacity: Capacity | None = None
    load: Load = Load()
    stats: EngineStats | None = None
    """Once its engine runs."""
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
    """Why a replica cannot start where it was placed, however often that is tried."""

    why: str
    version: str
    """Of the application that was deployed. A replica of an older one may refuse yet while a newer one starts."""


class Register:
    """The directory's memory: records and notes that vanish unless they are repeated."""

    def __init__(self, *, expiry_s: float = EXPIRY_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._expiry_s, self._clock = expiry_s, clock
        self._begun = clock()
        self._records: dict[str, tuple[float, ReplicaRecord]] = {}
        self._boards: dict[str, dict[str, tuple[float, Any]]] = {}

    def report(self, record: ReplicaRecord) -> None:
        self._records[record.id] = (self._clock(), record)

    def leave(self, replica_id: str) -> None:
        self._records.pop(replica_id, None)

    def records(self) -> tuple[bool, tuple[ReplicaRecord, ...]]:
        """Whether every living replica has had time to report since this memory began, and those that did."""
        self._records = self._fresh(self._records)
        return self._clock() - self._begun > self._expiry_s, tuple(record for _, record in self._records.values())

    def pin(self, board: str, key: str, note: Any) -> int:
        """Hang a note on a board; it too vanishes unless it is repeated. How many there are now. See `cluster.peer_notes`."""
        self._boards.setdefault(board, {})[key] = (self._clock(), note)
        return len(self.pinned(board))

    def pinned(self, board: str) -> dict[str, Any]:
        self._boards[board] = self._fresh(self._boards.get(board, {}))
        return {key: note for key, (_, note) in self._boards[board].items()}

    def demand(self, model: str) -> dict[str, list[dict[str, Any]]]:
        """For the autoscaler, in plain values: what its living replicas and what the fronts say of a model. See `cluster.autoscaling`."""
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

    def _fresh(self, entries: dict[str, tuple[float, Kept]]) -> dict[str, tuple[float, Kept]]:
        now = self._clock()
        return {key: entry for key, entry in entries.items() if now - entry[0] <= self._expiry_s}


class DirectoryUnavailable(Exception):
    """The directory does not answer; the message says why."""


def directory_actor(app: str) -> Any:
    """Handle of the app's directory, made if it is not there. Restarted for ever, and refilled by the heartbeats.

    It stands beside Ray's GCS and Ray Serve's controller, so that no host is lost with it but the head's. To be called where nobody is kept
    waiting: it asks the GCS, and while the head is being started anew no answer comes for as long as that takes.
    """
    options = {
        "name": _actor_name(app),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "max_task_retries": 0,
        "num_cpus": 0,
        "resources": {HEAD_NODE_RESOURCE_NAME: UNMEASURED},
    }
    return ray.remote(Register).options(**options).remote()


def _is_for_good(error: Exception) -> bool:
    """Whether an actor that answered so must be looked for anew; Ray itself finds one that is started again."""
    passing = (ray.exceptions.ActorUnavailableError, ray.exceptions.GetTimeoutError)
    return isinstance(error, ray.exceptions.RayError) and not isinstance(error, passing)


class DirectoryClient:
    """Asks the directory from an event loop that must not stand still, whatever has become of hosts.

    A handle that was found once is kept: Ray itself finds a directory that was started again. It is looked for anew, in a thread, only
    where Ray says that it will not come back.
    """

    def __init__(self, app: str, *, find: Callable[[str], Any] = directory_actor, answer_s: float = ANSWER_S) -> None:
        self._app, self._find, self._answer_s = app, find, answer_s
        self._finding: asyncio.Future[Any] | None = None
        self._away = False

    async def ask(self, method: str, *given: Any) -> Any:
        """What `Register.method` returns.

        Raises:
            DirectoryUnavailable: there is no answer in time.
        """
        try:
            async with asyncio.timeout(self._answer_s):
                if self._finding is None:
                    self._finding = self._look()
                actor = await asyncio.shield(self._finding)
                answer = await getattr(actor, method).remote(*given)
        except Exception as error:  # Ray raises many kinds, and of them one that is a TimeoutError, too
            found = self._finding
            if found is not None and found.done() and (found.exception() is not None or _is_for_good(error)):
                self._finding = None
            raise self._missed(str(error) or f"no answer within {self._answer_s:g} s") from error
        self._away = False
        return answer

    def _look(self) -> "asyncio.Future[Any]":
        """In a thread of its own: it may stand there for as long as the head is away."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[Any] = loop.create_future()

        def look() -> None:
            try:
                actor = self._find(self._app)
            except Exception as error:
                tell, told = found.set_exception, error
            else:
                tell, told = found.set_result, actor
            with contextlib.suppress(RuntimeError):  # nobody is there any more
                loop.call_soon_threadsafe(tell, told)

        threading.Thread(target=look, name="directory-finder", daemon=True).start()
        return found

    def _missed(self, why: str) -> DirectoryUnavailable:
        if not self._away:
            logger.warning("the directory does not answer, going on with what it said last: %s", why)
        self._away = True
        return DirectoryUnavailable(why)


def current_records(app: str) -> tuple[ReplicaRecord, ...]:
    """What the directory knows now; nothing while it does not answer. For callers without an event loop."""
    try:
        _, records = ray.get(directory_actor(app).records.remote(), timeout=5)
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError, ValueError):
        return ()
    return tuple(records)


def refusals(app: str) -> dict[str, Refusal]:
    """By replica, of the last `EXPIRY_S` seconds."""
    try:
        found: dict[str, Any] = ray.get(directory_actor(app).pinned.remote(REFUSALS), timeout=5)
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError, ValueError):
        return {}
    return {replica: refusal for replica, refusal in found.items() if isinstance(refusal, Refusal)}  # versions before pinned words


def read_directory(app: str, board: str) -> tuple[tuple[ReplicaRecord, ...], tuple[Any, ...]]:
    """What the directory knows of the replicas, and the notes on one of its boards; for onlookers, who make none where there is none.

    Raises:
        DirectoryUnavailable: it does not answer.
    """
    try:
        actor: Any = ray.get_actor(_actor_name(app), namespace=NAMESPACE)
    except ValueError:
        return (), ()
    except ray.exceptions.RayError as error:
        raise DirectoryUnavailable(str(error)) from error
    try:
        (_, records), notes = ray.get([actor.records.remote(), actor.pinned.remote(board)], timeout=LOOK_S)
    except ray.exceptions.GetTimeoutError:
        raise DirectoryUnavailable(f"no answer within {LOOK_S:g} s") from None
    except ray.exceptions.RayError as error:
        raise DirectoryUnavailable(str(error)) from error
    return tuple(records), tuple(notes.values())


def apps_with_directories() -> tuple[str, ...]:
    """Applications that were deployed, as Ray itself knows."""
    beginning = _actor_name("")
    named = ray.util.list_named_actors(all_namespaces=True)
    return tuple(sorted(actor["name"].removeprefix(beginning) for actor in named if actor["name"].startswith(beginning)))


def end_directory(app: str) -> None:
    """When an application is gone for good."""
    try:
        ray.kill(ray.get_actor(_actor_name(app), namespace=NAMESPACE))
    except (ray.exceptions.RayError, ValueError):
        return


def _actor_name(app: str) -> str:
    return f"replica-directory:{app}"


class Reporter:
    """A replica's side: tells the directory, and outlives its absence."""

    def __init__(self, app: str, *, find: Callable[[str], Any] = directory_actor) -> None:
        self._app, self._find = app, find
        self._actor: Any = None
        self._finder: threading.Thread | None = None
        self._pending: Any = None

    def report(self, record: ReplicaRecord) -> None:
        """Send without waiting; a report that the directory did not take in is superseded by the next."""
        try:
            if self._pending is not None:
                done, _ = ray.wait([self._pending], timeout=0)
                if not done:
                    return
                self._pending = None
                ray.get(done[0])
            if self._actor is None:
                self._look_for_it()
            else:
                self._pending = self._actor.report.remote(record)
        except (ray.exceptions.RayError, ValueError) as error:
            if not isinstance(error, ray.exceptions.ActorUnavailableError):
                self._actor = None
            logger.warning("the directory cannot be told: %s", error)

    def _look_for_it(self) -> None:
        """In a thread of its own: a heart that waits for Ray's GCS would not see what befalls the ranks."""
        if self._finder is None or not self._finder.is_alive():
            self._finder = threading.Thread(target=self._found, name="directory-finder", daemon=True)
            self._finder.start()

    def _found(self) -> None:
        try:
            self._actor = self._find(self._app)
        except (ray.exceptions.RayError, ValueError) as error:
            logger.warning("the directory cannot be found: %s", error)

    def refuse(self, replica_id: str, refusal: Refusal) -> None:
        """For whoever waits for this replica: Ray Serve knows but that its start failed, and tries again."""
        try:
            ray.get(directory_actor(self._app).pin.remote(REFUSALS, replica_id, refusal), timeout=2)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError, ValueError) as error:
            logger.warning("the directory cannot be told of a refusal: %s", error)

    def leave(self, replica_id: str) -> None:
        try:
            if self._actor is not None:
                ray.get(self._actor.leave.remote(replica_id), timeout=2)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            logger.warning("the directory cannot be told of the end: %s", error)


class Reader:
    """A front's side: asks the directory; its last answer stays valid while the directory is away or begins anew."""

    def __init__(self, app: str, *, model: str | None = None) -> None:
        """``model``: leave out the replicas of others."""
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
        """An answer that may not be complete yet adds to what is known; a complete one replaces it."""
        answer = {record.id: record for record in records if self._model in (None, record.model)}
        self._known = answer if complete else self._known | answer
