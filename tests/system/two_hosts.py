"""Two hosts on one machine: network namespaces with a cable between them that can be cut. Needs root and iproute2."""

import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.system.ray_host import Place


@dataclass(frozen=True)
class Cable:
    """Between the first and the second place."""

    places: tuple[Place, Place]
    ends: tuple[str, str]

    def cut(self) -> None:
        """As if it were pulled out: what is sent is lost, and nobody is told."""
        self._set("down")

    def mend(self) -> None:
        self._set("up")

    def _set(self, state: str) -> None:
        _ip("-n", str(self.places[1].namespace), "link", "set", self.ends[1], state)


@contextmanager
def two_hosts() -> Iterator[Cable]:
    tag = secrets.token_hex(2)
    places = [Place(f"10.214.77.{number}", f"manta-{tag}-{number}") for number in (1, 2)]
    ends = (f"m{tag}a", f"m{tag}b")
    with ExitStack() as stack:
        for place in places:
            _ip("netns", "add", str(place.namespace))
            stack.callback(_ip, "netns", "del", str(place.namespace))
            stack.enter_context(_names(place, places))
        _ip(
            "link",
            "add",
            ends[0],
            "netns",
            str(places[0].namespace),
            "type",
            "veth",
            "peer",
            "name",
            ends[1],
            "netns",
            str(places[1].namespace),
        )
        for place, end in zip(places, ends, strict=True):
            _ip("-n", str(place.namespace), "addr", "add", f"{place.ip}/24", "dev", end)
            _ip("-n", str(place.namespace), "link", "set", end, "up")
            _ip("-n", str(place.namespace), "link", "set", "lo", "up")
        yield Cable((places[0], places[1]), ends)


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
        with two_hosts():
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
