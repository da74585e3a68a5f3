"""Each fault of hosts once, on three of them; `python -m tests.faults --hosts` has them often, and docs/faults.md what came of it."""

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator

import pytest

from tests.faults.host_faults import HOST_FAULTS
from tests.faults.host_server import MANTA, Host, HostVictims, hosts_under_test
from tests.faults.run import GoldenAnswers
from tests.faults.test_faults import learned, one_that_struck
from tests.system.network import possible
from tests.system.server import eventually

pytestmark = [
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not possible(), reason="network namespaces need root and iproute2"),
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server"),
]


@pytest.fixture(scope="module")
def victims() -> Iterator[HostVictims]:
    with hosts_under_test() as victims:
        yield victims


@pytest.fixture(scope="module")
def goldens(victims: HostVictims) -> GoldenAnswers:
    return asyncio.run(learned(victims))


@pytest.mark.parametrize("name", HOST_FAULTS)
def test_no_stream_is_lost_with_a_host_and_the_server_is_whole_again(victims: HostVictims, goldens: GoldenAnswers, name: str) -> None:
    assert one_that_struck(victims, HOST_FAULTS[name], goldens).lost == 0


def status(host: Host) -> tuple[int, dict, str]:
    """What `manta status --json` typed there leaves with, tells, and says on stderr."""
    done = host.ray.run(*MANTA, "status", "--json", check=False, timeout_s=60)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def test_status_answers_whatever_is_lost_and_names_it(victims: HostVictims) -> None:
    head, near, far = victims.hosts.all
    asyncio.run(victims.wait_until_recovered())

    def tells(condition: Callable[[dict], bool]) -> None:
        eventually(lambda: condition(status(near)[1]), 120)

    tells(lambda seen: seen["missing"] == [] and len(seen["replicas"]) == 2)
    assert status(near)[0] == 0

    victims.hosts.network.cut(far.ray.place)
    left_with, seen, _ = status(near)
    assert left_with == 1
    assert any(str(far.ray.place.ip) in words and "cannot be reached" in words for words in seen["missing"]), seen
    victims.hosts.network.mend(far.ray.place)
    asyncio.run(victims.wait_until_recovered())

    frozen = far.family()
    for process in frozen:
        process.suspend()
    tells(lambda seen: len(seen["replicas"]) == 1 and [replica["state"] for replica in seen["replicas"]] == ["ready"])
    assert status(near)[0] == 1
    for process in frozen:
        process.resume()
    asyncio.run(victims.wait_until_recovered())

    head.kill()
    left_with, seen, said = status(near)
    assert (left_with, seen) == (1, {})
    assert f"its head takes no connection at {head.ray.address}" in said
    head.start_anew()
    asyncio.run(victims.wait_until_recovered())
    tells(lambda seen: seen["missing"] == [] and len(seen["replicas"]) == 2)
