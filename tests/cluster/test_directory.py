"""The directory is lost with its host, or Ray cannot be asked for it: who depends on it goes on with what it knows."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import ray.exceptions

from cluster.channel import Address
from cluster.directory import DirectoryClient, DirectoryUnavailable, ReplicaRecord, Reporter
from cluster.health import State

RECORD = ReplicaRecord(id="a", model="m", state=State.READY, address=Address(node="n", ipc="ipc:///a"))


class Directory:
    """A handle of the actor, that answers as it is told."""

    def __init__(self, answer: Callable[[str], Any]) -> None:
        self._answer = answer

    def __getattr__(self, method: str) -> Any:
        class Method:
            async def remote(_, *given: object) -> object:  # noqa: N805
                answer = self._answer(method)
                return await answer if asyncio.iscoroutine(answer) else answer

        return Method()


class Finder:
    """Stands for Ray's GCS."""

    def __init__(self, *directories: Directory) -> None:
        self._directories = iter(directories)
        self.num_asked = 0

    def __call__(self, app: str) -> Directory:
        self.num_asked += 1
        return next(self._directories)


def failing(error: Exception) -> Callable[[str], Any]:
    async def fail() -> object:
        raise error

    return lambda _method: fail()


def unavailable() -> Exception:
    return ray.exceptions.ActorUnavailableError("its host is gone", None)


async def test_who_asks_is_not_kept_waiting_and_the_handle_is_kept() -> None:
    silent = True
    find = Finder(Directory(lambda _method: asyncio.Event().wait() if silent else (True, (RECORD,))))
    client = DirectoryClient("app", find=find, timeout_s=0.2)
    for _ in range(2):
        with pytest.raises(DirectoryUnavailable, match="no answer within"):
            await client.ask("records")
    silent = False
    assert await client.ask("records") == (True, (RECORD,))
    assert find.num_asked == 1


async def test_one_that_is_started_again_elsewhere_is_waited_for_and_one_that_is_gone_is_looked_for() -> None:
    answers = iter([failing(unavailable()), failing(ray.exceptions.ActorDiedError())])
    find = Finder(Directory(lambda method: next(answers)(method)), Directory(lambda _method: {}))
    client = DirectoryClient("app", find=find, timeout_s=60)
    with pytest.raises(DirectoryUnavailable):
        await client.ask("pinned", "topic")
    assert find.num_asked == 1
    with pytest.raises(DirectoryUnavailable):
        await client.ask("pinned", "topic")
    assert find.num_asked == 1, "Ray finds it by itself while it may come back"
    assert await client.ask("pinned", "topic") == {}
    assert find.num_asked == 2


@pytest.mark.parametrize("error", [ray.exceptions.GetTimeoutError("the GCS server is dead"), OSError("no socket is left")])
async def test_one_that_could_not_be_found_is_looked_for_again(error: Exception) -> None:
    tries = iter([error, None])

    def find(app: str) -> Directory:
        if (failure := next(tries)) is not None:
            raise failure
        return Directory(lambda _method: "answer")

    client = DirectoryClient("app", find=find, timeout_s=60)
    with pytest.raises(DirectoryUnavailable, match=str(error)):
        await client.ask("records")
    assert await client.ask("records") == "answer"


async def test_an_event_loop_goes_on_while_the_head_is_away() -> None:
    head_is_back, asked = threading.Event(), []

    def find(app: str) -> Directory:
        asked.append(app)
        head_is_back.wait(60)
        return Directory(lambda _method: "answer")

    client = DirectoryClient("app", find=find, timeout_s=0.2)
    for _ in range(3):
        with pytest.raises(DirectoryUnavailable):
            await client.ask("records")
    assert asked == ["app"], "nobody asks again before there was an answer"
    head_is_back.set()
    answer = None
    async with asyncio.timeout(60):
        while answer is None:
            try:
                answer = await client.ask("records")
            except DirectoryUnavailable:
                continue
    assert (answer, asked) == ("answer", ["app"])


def test_a_replica_goes_on_beating_while_the_directory_is_looked_for() -> None:
    head_is_back, reported = threading.Event(), threading.Event()

    class Handle:
        class report:  # noqa: N801
            @staticmethod
            def remote(record: ReplicaRecord) -> None:
                assert record == RECORD
                reported.set()

    def find(app: str) -> type[Handle]:
        head_is_back.wait(60)
        return Handle

    reporter = Reporter("app", find=find)
    for _ in range(3):
        reporter.report(RECORD)
    assert not reported.is_set()
    head_is_back.set()
    while not reported.wait(0.01):
        reporter.report(RECORD)
