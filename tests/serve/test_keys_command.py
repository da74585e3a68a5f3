"""`manta keys`."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve.auth import KeyAuthenticator
from serve.caller import Scope
from serve.cli import app
from serve.errors import NotAuthenticated
from serve.key_file import read_keys


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def keys(path: Path, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["keys", arguments[0], *arguments[1:], "--file", str(path)])
    assert result.exit_code == code, result.output
    return result.stdout.strip()


def test_a_made_key_opens_the_door_with_what_was_asked_for_it(path: Path) -> None:
    shown = keys(path, "create", "--name", "alice", "--scope", "infer", "--scope", "metrics", "--requests-per-minute", "60", "--share", "2")
    caller = KeyAuthenticator(path).authenticate([f"Bearer {shown}"], Scope.METRICS)
    assert (caller.quota.requests_per_minute, caller.quota.concurrency, caller.share) == (60, None, 2.0)


def test_the_list_shows_everything_but_keys(path: Path) -> None:
    shown = keys(path, "create", "--name", "alice", "--concurrency", "3")
    listed = keys(path, "list")
    assert "alice" in listed
    assert "3 at a time" in listed
    assert shown not in listed
    assert read_keys(path)[0].secrets[0].sha256 not in listed


@pytest.mark.parametrize("name", ["[team] alice", "a[/b]", ":smile:"])
def test_the_list_shows_names_as_they_are(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys(path, "create", "--name", name)
    assert name in keys(path, "list")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes any output for a terminal
    shown = keys(path, "list")
    assert "quotas" in shown, "the table has headings"
    assert name in shown


def test_a_revoked_key_is_refused(path: Path) -> None:
    gone, stays = keys(path, "create"), keys(path, "create")
    keys(path, "revoke", read_keys(path)[0].id)
    authenticator = KeyAuthenticator(path)
    assert authenticator.authenticate([f"Bearer {stays}"])
    with pytest.raises(NotAuthenticated):
        authenticator.authenticate([f"Bearer {gone}"])


def test_a_rotated_key_is_taken_beside_its_successor(path: Path) -> None:
    old = keys(path, "create")
    new = keys(path, "rotate", read_keys(path)[0].id, "--grace", "1h")
    authenticator = KeyAuthenticator(path)
    assert authenticator.authenticate([f"Bearer {old}"]) == authenticator.authenticate([f"Bearer {new}"])
    assert "1 older secret still taken" in keys(path, "list")


def test_mistakes_are_told(path: Path) -> None:
    keys(path, "list", code=1)
    refused = CliRunner().invoke(app, ["keys", "create", "--scope", "root", "--file", str(path)])
    assert (refused.exit_code, refused.stderr) == (2, "manta: there is no scope 'root'; --scope takes infer, admin, metrics\n")
    keys(path, "create", "--concurrency", "0", code=1)
    assert not path.exists()
    keys(path, "create")
    keys(path, "revoke", "nobody", code=1)
    keys(path, "rotate", read_keys(path)[0].id, "--grace", "soon", code=1)
    assert len(read_keys(path)) == 1


def test_a_file_that_cannot_be_written_is_named_and_not_what_lies_beside_it(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "keys.json", tmp_path / "keys.json"):
        (tmp_path / "keys.json.lock").mkdir(exist_ok=True)
        done = CliRunner().invoke(app, ["keys", "create", "--file", str(path)])
        reason = "Is a directory" if path.parent == tmp_path else "No such file or directory"
        assert (done.exit_code, done.stderr) == (1, f"manta: the key file {path} cannot be written: {reason}\n")
