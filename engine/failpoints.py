"""Named points at which tests make a process fail. Does nothing unless `MANTA_FAILPOINTS` is set in the environment.

The variable names a folder. Arming a point writes the file ``<folder>/<point>``. Every process of the host that reaches the point reads the
file; the one that fires removes it, so that a point fires once however many processes reach it. `POINTS` lists all points.
"""

import contextlib
import itertools
import json
import logging
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)

FOLDER = os.environ.get("MANTA_FAILPOINTS", "")
Action = Literal["crash", "abort", "error", "memory", "delay", "drop"]
POINTS = {
    "rank.load": "a rank, before it loads its weights",
    "rank.step": "a rank that has read a plan",
    "rank.answer": "a rank that has computed a step, before it answers",
    "rank.logits": "a sampling rank that has computed a step's logits",
    "replica.start": "a replica, before it starts ranks",
    "replica.recover": "a replica that has lost ranks",
    "replica.heartbeat": "a replica, before it reports to the directory",
    "canary.send": "a replica, before it asks itself for a token",
    "engine.turn": "the engine's thread, at the start of a turn",
    "engine.apply": "the engine's thread, before it records a step",
    "executor.submit": "the engine's thread, before a plan goes to the ranks",
    "intake.read": "a replica, with a message of a front",
    "intake.send": "a replica, with a message for a front",
    "link.send": "a front, with a message for a replica",
    "link.receive": "a front, with a message of a replica",
    "router.choose": "a front, before it chooses a replica",
    "router.resume": "a front, after a stream lost its replica",
    "service.begin": "a front, with a choice that it has read",
}
"""Every point, and which process reaches it when."""
DROPPABLE = frozenset({"rank.answer", "rank.logits", "replica.heartbeat", "intake.read", "intake.send", "link.send", "link.receive"})
"""Points that can lose something: a message, or the values of logits, which then are NaN."""


class Injected(RuntimeError):
    """The error that an armed point raises."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What happens at an armed point."""

    action: Action
    """crash: SIGKILL; abort: SIGABRT, as native code ends on its own errors; error: raises Injected; memory: raises MemoryError;
    delay: sleeps; drop: the message is lost."""
    after: int = 1
    """Fires at this hit of a process, counted from arming."""
    seconds: float = 1.0
    """Length of a delay."""
    token: int | None = None
    """Only hits that concern this token count, and each of them fires until the point is disarmed: a poisoned request."""
    pid: int | None = None
    """Only hits of this process count, and each of them fires until the point is disarmed: a link broken in one direction."""


def arm(folder: Path, point: str, failure: Failure) -> None:
    """Arm a point for the processes that watch the folder, even if it fired before.

    Raises:
        ValueError: there is no such point.
    """
    if point not in POINTS:
        raise ValueError(f"there is no failpoint {point!r}")
    (folder / f"{point}.fired").unlink(missing_ok=True)
    unready = folder / f".{point}"
    unready.write_text(json.dumps(asdict(failure)))
    unready.rename(folder / point)


def disarm(folder: Path, point: str) -> bool:
    """Returns whether the point was armed and had not fired."""
    try:
        (folder / point).unlink()
    except FileNotFoundError:
        return False
    return True


def has_fired(folder: Path, point: str) -> bool:
    """Whether the point has fired since it was armed."""
    return (folder / f"{point}.fired").exists()


def _look(point: str, tokens: Callable[[], Iterable[int]] | None = None) -> bool:
    file = Path(FOLDER, point)
    try:
        armed = os.stat(file).st_mtime_ns
        failure = Failure(**json.loads(file.read_text()))
    except FileNotFoundError:
        return False
    if failure.pid is not None and failure.pid != os.getpid():
        return False
    if failure.token is not None and (tokens is None or failure.token not in tokens()):
        return False
    if failure.pid is not None or failure.token is not None:
        Path(f"{file}.fired").touch()
        return _fail(point, failure)
    if next(_hits.setdefault((point, armed), itertools.count(1))) < failure.after:
        return False
    fired = f"{file}.fired"
    try:
        os.rename(file, fired)
    except FileNotFoundError:  # another process was first
        return False
    return _fail(point, failure)


_hits: dict[tuple[str, int], "itertools.count[int]"] = {}


def _fail(point: str, failure: Failure) -> bool:
    logger.warning("failpoint %s: %s in process %d", point, failure.action, os.getpid())
    match failure.action:
        case "crash":
            with contextlib.suppress(OSError):
                os.kill(os.getpid(), signal.SIGKILL)
        case "abort":
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core dump
            os.abort()
        case "error":
            raise Injected(point)
        case "memory":
            raise MemoryError(point)
        case "delay":
            time.sleep(failure.seconds)
        case "drop":
            return True
    return False


def _off(point: str, tokens: Callable[[], Iterable[int]] | None = None) -> bool:
    return False


hit: Callable[..., bool] = _look if FOLDER else _off
"""``hit(point, tokens=None)``: this process has reached a point. Returns True if the message at hand is to be lost. ``tokens`` returns the
token ids concerned."""
