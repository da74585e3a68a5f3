"""Every failpoint with every action, as a fault of its own, such as ``crash@rank.step@2``: action, failpoint, and which hit fails."""

import asyncio
import random
from collections.abc import Iterator
from functools import partial

from engine.failpoints import DROPPABLE, POINTS, Action, Failure, arm, has_fired
from tests.faults import side_requests
from tests.faults.catalogue import FRONT_LOST, Fault, Inject, Injected
from tests.faults.server import Victims
from tests.processes import kill

HITS = (1, 2, 5)
FEWER_HITS = {"rank.load": (1,), "replica.start": (1,), "replica.recover": (1,), "replica.heartbeat": (1, 2), "router.resume": (1, 2)}
"""Failpoints that are reached less often while the streams run."""
RANK_KILLED = frozenset({"rank.load", "replica.start", "replica.recover", "canary.send"})
REPLICA_KILLED = frozenset({"router.resume"})
NEWCOMERS = frozenset({"service.begin", "router.choose", "intake.read"})
"""Failpoints that are reached only with more requests; those above only after a loss."""
DELAY_S = 3.0
REACHED_S = 15.0
"""How long to wait for a failpoint that is reached during recovery; the streams may have been resumed elsewhere and be over by then."""
FRONT_POINTS = frozenset({"link.send", "link.receive", "router.choose", "router.resume", "service.begin"})
INTERNAL = frozenset({"internal_error", "INTERNAL_ERROR", "500 internal_error"})
WHAT: dict[Action, str] = {
    "crash": "killed",
    "error": "raises",
    "delay": f"hangs for {DELAY_S:g} s",
    "drop": "loses the message or logits",
}


def _reaching(point: str, failure: Failure) -> Inject:
    async def inject(victims: Victims, chance: random.Random) -> Injected:
        arm(victims.failpoints, point, failure)
        gone: frozenset[int] = frozenset()
        if point in RANK_KILLED:
            gone = kill([chance.choice(victims.ranks())])
        elif point in REPLICA_KILLED:
            gone = kill([chance.choice(victims.replicas())])
        on_the_way_back = partial(_until_reached, victims, point) if point in RANK_KILLED else None
        return Injected(gone=gone, undo=on_the_way_back, points=(point,))

    return inject


async def _until_reached(victims: Victims, point: str) -> None:
    loop = asyncio.get_running_loop()
    until = loop.time() + REACHED_S
    while loop.time() < until:
        if has_fired(victims.failpoints, point):
            return
        await asyncio.sleep(0.1)


def _tier(point: str, action: Action) -> int:
    return 2 if point in FRONT_POINTS and action == "crash" else 1


def _swept() -> Iterator[Fault]:
    """All faults at the first hit, then those at later hits."""
    for after in HITS:
        for point in POINTS:
            for action in WHAT:
                if after in FEWER_HITS.get(point, HITS) and (action != "drop" or point in DROPPABLE):
                    tells = point in FRONT_POINTS and action in ("crash", "error")
                    yield Fault(
                        f"{action}@{point}@{after}",
                        WHAT[action],
                        _reaching(point, Failure(action=action, after=after, seconds=DELAY_S)),
                        tier=_tier(point, action),
                        may_fail=(FRONT_LOST if action == "crash" else INTERNAL) if tells else frozenset(),
                        side_requests=side_requests.newcomers(may_fail=int(tells)) if point in NEWCOMERS else None,
                    )


SWEPT = {fault.name: fault for fault in _swept()}


def point_of(name: str) -> str:
    """The failpoint in the name of a fault of `SWEPT`."""
    return name.split("@")[1]


def hit_of(name: str) -> int:
    return int(name.split("@")[2])
