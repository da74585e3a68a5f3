"""A port that is taken is told before anything is started."""

import socket

import pytest
from typer.testing import CliRunner

from serve.cli import app
from serve.ports import PortInUse, check_free


@pytest.mark.parametrize("reuse", [False, True])
def test_a_port_that_somebody_listens_on_is_refused_even_if_they_would_share_it(reuse):
    with socket.socket() as other:
        if reuse:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortInUse, match=rf"127.0.0.1:{port} already.* --http-port"):
            check_free("127.0.0.1", port, api="http")
    check_free("127.0.0.1", port, api="http")


def test_an_address_of_another_host_is_refused():
    with pytest.raises(PortInUse, match=r"203\.0\.113\.7 is no address of this host.* --http-host"):
        check_free("203.0.113.7", 8000, api="http")


def test_a_taken_port_is_told_before_a_model_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.commands.serve.find_local_models", lambda _config: pytest.fail("fetched a model in vain"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        done = CliRunner().invoke(app, ["serve", "demo", "--grpc-port", str(other.getsockname()[1])])
    assert done.exit_code == 1
    assert "choose another port with --grpc-port" in done.stderr
