"""Several hosts on one machine: network namespaces on a switch, by cables that can be cut, one way too. Needs root and iproute2."""

import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tests.system.ray_host import Place

NOBODY = "02:00:00:00:00:01"
"""A hardware address that no card has: what is sent there is lost, and nobody is told."""


class Cut(Enum):
    BOTH = "both ways"
    TOWARDS = "towards it"
    FROM = "from it"


@dataclass(frozen=True)
class End:
    """A cable's end: a place, and the name of its card."""

    place: Place
    card: str


@dataclass(frozen=True)
class Network:
    """Hosts, and this machine itself as one more at the same switch: who is a client of the hosts need not be on one."""

    switch: str
    ends: tuple[End, ...]
    outside: End

    @property
    def places(self) -> tuple[Place, ...]:
        return tuple(end.place for end in self.ends)

    def cut(self, place: Place, ways: Cut = Cut.BOTH) -> None:
        """As if the cable were pulled out, or one of its wires broken: what is sent is lost, and nobody is told."""
        own, others = self._sides(place)
        if ways is Cut.BOTH:
            _ip("-n", self.switch, "link", "set", _port(own), "down")
        for sender, receiver in self._wires(own, others, ways):
            _ip(*_at(sender.place), "neigh", "replace", receiver.place.ip, "lladdr", NOBODY, "nud", "permanent", "dev", sender.card)

    def mend(self, place: Place, ways: Cut = Cut.BOTH) -> None:
        own, others = self._sides(place)
        if ways is Cut.BOTH:
            _ip("-n", self.switch, "link", "set", _port(own), "up")
        for sender, receiver in self._wires(own, others, ways):
            _ip(*_at(sender.place), "neigh", "del", receiver.place.ip, "dev", sender.card)

    def _sides(self, place: Place) -> tuple[End, list[End]]:
        everybody = (*self.ends, self.outside)
        return next(end for end in everybody if end.place == place), [end for end in everybody if end.place != place]

    def _wires(self, own: End, others: Sequence[End], ways: Cut) -> list[tuple[End, End]]:
        """(sender, receiver) of what must be lost although the cable is in."""
        towards, away = [(other, own) for other in others], [(own, other) for other in others]
        return {Cut.TOWARDS: towards, Cut.FROM: away, Cut.BOTH: []}[ways]


@contextmanager
def network(num_hosts: int) -> Iterator[Network]:
    tag, subnet = secrets.token_hex(2), f"10.214.{20 + secrets.randbelow(200)}"
    switch = f"manta-{tag}-switch"
    ends = tuple(End(Place(f"{subnet}.{number}", f"manta-{tag}-{number}"), f"m{tag}{number}") for number in range(1, num_hosts + 1))
    outside = End(Place(f"{subnet}.254"), f"m{tag}out")
    with ExitStack() as stack:
        for namespace in (switch, *(str(end.place.namespace) for end in ends)):
            _ip("netns", "add", namespace)
            stack.callback(_ip, "netns", "del", namespace)
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        for end in (*ends, outside):
            own = ["netns", end.place.namespace] if end.place.namespace else []
            _ip("link", "add", end.card, *own, "type", "veth", "peer", "name", _port(end), "netns", switch)
            _ip("-n", switch, "link", "set", _port(end), "master", "switch", "up")
            _ip(*_at(end.place), "addr", "add", f"{end.place.ip}/24", "dev", end.card)
            _ip(*_at(end.place), "link", "set", end.card, "up")
        for end in ends:
            _ip(*_at(end.place), "link", "set", "lo", "up")
            stack.enter_context(_names(end.place, [each.place for each in ends]))
        yield Network(switch, ends, outside)


def _port(end: End) -> str:
    return f"{end.card}p"


def _at(place: Place) -> list[str]:
    return ["-n", place.namespace] if place.namespace else []


@contextmanager
def _names(place: Place, places: Sequence[Place]) -> Iterator[None]:
    """What stands in for /etc/hosts and /etc/resolv.conf there (ip-netns(8)): Ray asks for its host's name, and no name server answers."""
    folder = Path("/etc/netns") / str(place.namespace)
    folder.mkdir(parents=True)
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{each.ip} {each.namespace}\n" for each in places))
    (folder / "resolv.conf").touch()
    try:
        yield
    finally:
        shutil.rmtree(folder)


def possible() -> bool:
    """Whether this user may make namespaces here."""
    try:
        with network(2):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
