import fcntl
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
import zmq

from cluster.channel import Address, KeyAuthenticator, PrivateFolder, connect, listen, new_keys
from cluster.errors import ChannelError


@pytest.fixture(autouse=True)
def own_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as short:  # pytest's own are too long for Unix sockets
        monkeypatch.setattr(tempfile, "tempdir", short)
        yield Path(short)


def test_nobody_else_can_enter_the_folder_of_sockets() -> None:
    folder = PrivateFolder()
    assert stat.S_IMODE(os.stat(folder.path).st_mode) == 0o700
    folder.close()
    assert not folder.path.exists()


def test_the_folder_of_a_killed_owner_is_swept_and_that_of_a_living_one_is_not(own_temporary_folder: Path) -> None:
    script = "from cluster.channel import PrivateFolder; f = PrivateFolder(); print(f.path, flush=True); import os; os.kill(os.getpid(), 9)"
    killed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "TMPDIR": str(own_temporary_folder)}, check=False
    )
    left = Path(killed.stdout.strip())
    assert left.exists()
    living = PrivateFolder()
    another = PrivateFolder()
    assert not left.exists()
    assert living.path.exists()
    living.close()
    another.close()


def test_a_sweeper_leaves_a_folder_alone_that_is_being_made(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = fcntl.flock

    def late_lock(file: IO[str], operation: int) -> None:
        if not operation & fcntl.LOCK_NB:  # the owner's: another process sweeps at just this moment
            PrivateFolder._sweep()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late_lock)
    folder = PrivateFolder()
    assert (folder.path / "lock").exists()
    PrivateFolder._sweep()
    assert (folder.path / "lock").exists()
    folder.close()


def test_a_path_too_long_for_a_unix_socket_is_refused_with_the_remedy() -> None:
    folder = PrivateFolder()
    with pytest.raises(ValueError, match="TMPDIR"):
        folder.socket("x" * 100)
    folder.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "*", "", None])
def test_an_internal_port_is_never_bound_to_every_address(host: str | None) -> None:
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket, pytest.raises(ValueError, match="one address"):
        listen(socket, ipc=None, tcp_host=host, keys=new_keys(), node="a")


def test_an_endpoint_that_does_not_listen_for_other_hosts_cannot_be_reached_from_one() -> None:
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket, pytest.raises(ChannelError, match="other hosts"):
        connect(socket, Address(node="a", ipc="ipc:///nowhere"), node="b", keys=new_keys())


@pytest.mark.parametrize("known", [True, False])
def test_over_tcp_only_the_holder_of_a_known_key_is_heard(known: bool) -> None:
    server, client = zmq.Context(), zmq.Context()
    keys, stranger = new_keys(), new_keys()
    guard = KeyAuthenticator(server, {keys.public})
    try:
        listener, caller = server.socket(zmq.PULL), client.socket(zmq.PUSH)
        address = listen(listener, ipc=None, tcp_host="127.0.0.1", keys=new_keys(), node="a")
        assert address.tcp is not None
        assert address.tcp.startswith("tcp://127.0.0.1:")
        connect(caller, address, node="b", keys=keys if known else stranger)
        caller.send(b"hello")
        heard = bool(listener.poll(60_000 if known else 500))
        assert heard is known
    finally:
        guard.close()
        client.destroy(linger=0)
        server.destroy(linger=0)


def test_beside_a_guarded_port_the_unix_socket_stays_open_to_this_host() -> None:
    server, client = zmq.Context(), zmq.Context()
    folder = PrivateFolder()
    guard = KeyAuthenticator(server, set())
    try:
        listener, caller = server.socket(zmq.PULL), client.socket(zmq.PUSH)
        address = listen(listener, ipc=folder.socket("s"), tcp_host="127.0.0.1", keys=new_keys(), node="a")
        connect(caller, address, node="a", keys=None)
        caller.send(b"hello")
        assert listener.poll(60_000)
    finally:
        guard.close()
        client.destroy(linger=0)
        server.destroy(linger=0)
        folder.close()


def test_a_secret_key_is_not_shown() -> None:
    keys = new_keys()
    assert keys.secret.decode() not in repr(keys)
