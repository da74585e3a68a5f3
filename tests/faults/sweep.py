"""Every failpoint with everything that can happen there, as faults of their own: `crash at rank.step 3` is one of them."""

import random

from engine.failpoints import DROPPABLE, POINTS, Action, Failure, arm
from tests.faults.catalogue import Fault, Harm, Inject, kill
from tests.faults.server import Victims

HITS = (1, 2, 5)
DELAY_S = 3.0
OF_FRONTS = frozenset({"link.send", "link.receive", "router.choose", "router.resume", "service.begin"})
INTERNAL = frozenset({"internal_error", "INTERNAL", "500 internal_error"})
WHAT: dict[Action, str] = {
    "crash": "the process is killed",
    "error": "it raises",
    "delay": f"it stands still for {DELAY_S:g} s",
    "drop": "the message is lost",
}


def _bringing_there(point: str, failure: Failure) -> Inject:
    """Armed, and what it takes that somebody comes there: a loss, or a start."""

    async def inject(victims: Victims, chance: random.Random) -> Harm:
        arm(victims.failpoints, point, failure)
        gone: frozenset[int] = frozenset()
        if point in ("rank.load", "replica.start", "replica.recover"):
            gone = kill([chance.choice(victims.ranks())])
        elif point == "router.resume":
            gone = kill([chance.choice(victims.replicas())])
        return Harm(gone=gone, points=(point,))

    return inject


def _tier(point: str, action: Action) -> int:
    return 2 if point in OF_FRONTS and action == "crash" else 1


def _swept() -> dict[str, Fault]:
    found = {}
    for point in POINTS:
        for action in ("crash", "error", "delay", *(("drop",) if point in DROPPABLE else ())):
            for after in HITS:
                name = f"{action}@{point}@{after}"
                inject = _bringing_there(point, Failure(action=action, after=after, seconds=DELAY_S))  # type: ignore[arg-type]
                may_fail = INTERNAL if point in OF_FRONTS and action == "error" else frozenset()
                found[name] = Fault(name, name, inject, tier=_tier(point, action), may_fail=may_fail)  # type: ignore[arg-type]
    return found


SWEPT = _swept()


def says(name: str) -> tuple[str, str, int]:
    """Where, what, and the tier."""
    action, point, after = name.split("@")
    return f"`{point}`: {POINTS[point]}", f"{WHAT[action]} (hit {after})", SWEPT[name].tier  # type: ignore[index]
