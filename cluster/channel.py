"""Places 4, 5 and 8 of a request: the sockets that carry messages.

Processes of one host use Unix sockets in a private folder. Between hosts it is TCP on the node's own address, always encrypted, with
mutual authentication by CURVE keys, which are exchanged through Ray only.
"""

import fcntl
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio
from zmq.auth.thread import ThreadAuthenticator

from cluster.errors import ChannelError

MAX_SOCKETS = 16_384
"""Limit of `shared_context`. libzmq's default is 1,023, and a front needs three for each replica."""


def shared_context() -> zmq.asyncio.Context:
    """The zmq context of all sockets of a front or a proxy. Call it when the process starts, so that libzmq's threads start then: without
    a free file descriptor a starting thread aborts the whole process, whereas opening a socket only fails."""
    context = zmq.asyncio.Context.instance()
    if context.get(zmq.MAX_SOCKETS) != MAX_SOCKETS:
        context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        zmq.Socket(context, zmq.PUSH).close()  # the first socket starts the threads
    return context


@dataclass(frozen=True, slots=True)
class KeyPair:
    """CURVE keys (Curve25519, as Z85 text). The repr leaves out the secret."""

    public: bytes
    secret: bytes = field(repr=False)


def new_keys() -> KeyPair:
    return KeyPair(*zmq.curve_keypair())


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where an endpoint listens, and the public key that authenticates it to other hosts."""

    node: str
    """Ray's node id. Processes of the same node connect over `ipc`."""
    ipc: str | None = None
    tcp: str | None = None
    public_key: bytes | None = None


class PrivateFolder:
    """A temporary folder for Unix sockets that only this user can enter.

    The owner holds a lock in it. Creating a folder deletes those whose owner was killed without deleting them.
    """

    PREFIX = "manta-"

    def __init__(self) -> None:
        self._sweep()
        made = Path(tempfile.mkdtemp(prefix=f"new-{self.PREFIX}"))  # mode 0700; `_sweep` ignores this name until the lock is held
        try:
            self._lock = open(made / "lock", "w")  # noqa: SIM115  (held until close)
        except OSError:
            made.rmdir()  # without a lock it would never be swept
            raise
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = made.rename(made.with_name(made.name.removeprefix("new-")))

    def socket(self, name: str) -> str:
        """The zmq endpoint ``name`` in this folder. Raises ValueError if its path is too long for a Unix socket."""
        path = str(self.path / name)
        if len(path.encode()) > 107:
            raise ValueError(f"{path} is too long for a Unix socket (107 bytes); set TMPDIR to a shorter folder")
        return f"ipc://{path}"

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    @classmethod
    def _sweep(cls) -> None:
        for folder in Path(tempfile.gettempdir()).glob(f"{cls.PREFIX}*/lock"):
            try:
                facts = folder.lstat()
                if facts.st_uid != os.getuid() or not stat.S_ISREG(facts.st_mode):
                    continue
                with folder.open() as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder.parent, ignore_errors=True)
            except OSError:
                continue  # its owner is alive, or another process sweeps it


def listen(socket: "zmq.Socket[bytes]", *, ipc: str | None, tcp_host: str | None, keys: KeyPair, node: str) -> Address:
    """Bind ``socket`` to ``ipc``, ``tcp_host`` or both. With ``tcp_host`` its context must have a `KeyAuthenticator`."""
    if ipc is not None:
        socket.bind(ipc)
        if tcp_host is None:
            return Address(node=node, ipc=ipc)
    if tcp_host in (None, "", "0.0.0.0", "::", "*"):  # noqa: S104  (refused, not bound)
        raise ValueError(f"an internal port must be bound to one address, not {tcp_host!r}")
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    port = socket.bind_to_random_port(f"tcp://{tcp_host}")
    return Address(node=node, ipc=ipc, tcp=f"tcp://{tcp_host}:{port}", public_key=keys.public)


def connect(socket: "zmq.Socket[bytes]", address: Address, *, node: str, keys: KeyPair | None) -> None:
    """Connect ``socket`` to an endpoint: over the Unix socket on the same host, else over encrypted TCP.

    Raises:
        ChannelError: the endpoint does not listen for other hosts.
    """
    if address.node == node and address.ipc is not None:
        socket.connect(address.ipc)
        return
    if address.tcp is None or address.public_key is None or keys is None:
        raise ChannelError(f"the endpoint on node {address.node} cannot be reached from node {node}: it does not listen for other hosts")
    socket.curve_serverkey = address.public_key
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.connect(address.tcp)


class KeyAuthenticator:
    """Admits only peers that hold one of the ``allowed`` public keys to the CURVE sockets of a context (ZAP, zmq RFC 27)."""

    def __init__(self, context: "zmq.Context[Any]", allowed: set[bytes]) -> None:
        self.allowed = allowed
        self._thread = ThreadAuthenticator(context)
        self._thread.start()
        self._thread.configure_curve_callback(domain="*", credentials_provider=self)

    def callback(self, domain: str, key: bytes) -> bool:
        return key in self.allowed

    def close(self) -> None:
        self._thread.stop()
