"""The notes of fronts, against the real directory without Ray."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

from cluster.directory import DirectoryClient, Register
from cluster.peer_notes import PeerNotes
from serve.caller import Caller, Quota, Scope
from serve.errors import QuotaExceeded
from serve.quotas import Quotas
from serve.request import ChatRequest, Message
from tests.cluster.fakes import eventually


class Actor:
    """Calls the methods of a `Register` as Ray calls those of its actor."""

    def __init__(self, register: Register) -> None:
        self._register = register

    def __getattr__(self, method: str) -> Any:
        async def remote(*arguments: object) -> object:
            return getattr(self._register, method)(*arguments)

        return SimpleNamespace(remote=remote)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Front:
    """A note that can be withheld, and what the front learned of its peers."""

    def __init__(self, name: str, register: Register) -> None:
        self.draining = False
        self.notes = PeerNotes[str](
            "app", "accepting", name, directory=DirectoryClient("app", find=lambda _app: Actor(register), timeout_s=60)
        )
        self.notes.keep_publishing(lambda: None if self.draining else name, every_s=0.001)


@asynccontextmanager
async def two_fronts() -> AsyncIterator[tuple[Front, Front, Clock]]:
    clock = Clock()
    register = Register(expiry_s=10, clock=clock)
    a, b = Front("a", register), Front("b", register)
    try:
        await eventually(lambda: (a.notes.num_peers, b.notes.num_peers) == (1, 1))
        yield a, b, clock
    finally:
        await asyncio.gather(a.notes.close(), b.notes.close())


def seconds_pass_until(condition: Callable[[], bool], clock: Clock) -> Callable[[], bool]:
    def passing() -> bool:
        clock.now_s += 1
        return condition()

    return passing


async def test_a_front_that_publishes_nothing_is_no_peer_after_a_while_until_it_publishes_again() -> None:
    async with two_fronts() as (a, b, clock):
        assert await b.notes.peers() == ("a",)
        a.draining = True
        await eventually(seconds_pass_until(lambda: b.notes.num_peers == 0, clock))
        assert clock.now_s > 10
        assert await b.notes.peers() == ()
        assert a.notes.num_peers == 1, "it learns nothing meanwhile"
        a.draining = False
        await eventually(lambda: b.notes.num_peers == 1)


async def test_the_part_of_a_quota_that_a_draining_front_granted_goes_to_the_others() -> None:
    async with two_fronts() as (a, b, clock):
        quotas = Quotas(num_fronts=lambda: b.notes.num_peers + 1, clock=clock)
        caller = Caller(id="k", scopes=frozenset({Scope.INFER}), quota=Quota(requests_per_minute=60))
        request = ChatRequest(request_id="r", model="m", messages=(Message(role="user", content="hi"),), caller=caller)

        def granted() -> int:
            for number in range(100):
                try:
                    quotas.begin(request).ended()
                except QuotaExceeded:
                    return number
            raise AssertionError("it grants anything")

        assert granted() == 30
        a.draining = True
        await eventually(seconds_pass_until(lambda: b.notes.num_peers == 0, clock))
        quotas.headers(caller)
        clock.now_s += 60
        assert granted() == 60
