"""Notes of the servers on this machine."""

import json
from pathlib import Path

import pytest

from serve.local_servers import registered, running_servers


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path))
    return tmp_path


def test_a_server_is_known_for_as_long_as_it_runs(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.touch()
    with registered("127.0.0.1:1234", str(token)):
        (note,) = running_servers()
        assert (note.address, note.token) == ("127.0.0.1:1234", str(token))
    assert running_servers() == []


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
    with registered("127.0.0.1:1234", "/nowhere"):
        assert running_servers() == []
