"""Notes of the servers on this machine."""

import json
import os
from pathlib import Path

import pytest
import typer

from serve.commands.status import _meant
from serve.local_servers import registered, running_servers


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path))
    return tmp_path


def test_a_server_is_known_for_as_long_as_it_runs(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.touch()
    with registered(str(token), http="http://127.0.0.1:8000") as set_address:
        set_address("127.0.0.1:1234")
        (note,) = running_servers()
        assert (note.address, note.token) == ("127.0.0.1:1234", str(token))
    assert running_servers() == []


def test_one_that_is_starting_its_ray_is_told_of_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its Ray may be found already, and would refuse whoever does not know the token."""
    token = tmp_path / "token"
    token.touch()
    with registered(str(token), http="http://127.0.0.1:8000") as set_address:
        with pytest.raises(typer.Exit):
            _meant(None)
        told = capsys.readouterr().err
        assert "the server at http://127.0.0.1:8000" in told
        assert "is starting its Ray" in told
        assert _meant("10.0.0.1:6379") == ("10.0.0.1:6379", None)
        set_address("127.0.0.1:1234")
        assert _meant(None)[0] == "127.0.0.1:1234"


def test_what_a_killed_server_left_is_swept(cache: Path) -> None:
    left = cache / "servers" / "1.json"
    left.parent.mkdir()
    left.write_text(json.dumps({"pid": 1, "address": "a", "token": "/nowhere"}))
    (left.parent / "2.json").write_text("{")
    assert running_servers() == []
    assert list(left.parent.iterdir()) == []


def test_a_cache_that_cannot_be_written_to_stops_no_server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "file").touch()
    monkeypatch.setenv("MANTA_CACHE", str(cache / "file"))
    with registered("/nowhere", http="") as set_address:
        set_address("127.0.0.1:1234")
        assert running_servers() == []


def test_of_several_servers_one_is_named_by_its_ray_and_its_token_is_known(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _meant(None) == ("auto", None)
    (cache / "servers").mkdir()
    (cache / "token").touch()
    for pid, port in ((os.getpid(), 8000), (os.getppid(), 8001)):
        record = {"pid": pid, "address": f"127.0.0.1:{port + 1000}", "token": str(cache / "token"), "http": f"http://127.0.0.1:{port}"}
        (cache / "servers" / f"{pid}.json").write_text(json.dumps(record))
    with pytest.raises(typer.Exit):
        _meant(None)
    assert "--ray-address 127.0.0.1:9001  http://127.0.0.1:8001" in capsys.readouterr().err
    address, server = _meant("127.0.0.1:9001")
    assert server is not None
    assert (address, server.address, server.token) == ("127.0.0.1:9001", "127.0.0.1:9001", str(cache / "token"))
    assert _meant("10.0.0.1:6379") == ("10.0.0.1:6379", None)
