"""Keys: who is let in, for what, and how soon a change of the file is seen."""

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest

from serve import auth
from serve.auth import KeyAuthenticator, NoAuthentication
from serve.caller import ANONYMOUS, Scope
from serve.errors import NotAllowed, NotAuthenticated
from serve.key_file import KeyFileError, locked_key_file, new_key, read_keys, rotate_key


class Clock:
    now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def write(path: Path, *keys) -> None:
    with locked_key_file(path) as written:
        written(keys)


def test_the_owner_of_a_key_is_known_by_it_and_nobody_else_is_let_in(path: Path) -> None:
    shown, key = new_key(name="alice")
    other, _ = new_key(name="bob")
    write(path, key)
    authenticator = KeyAuthenticator(path)
    assert authenticator.authenticate([f"Bearer {shown}"]).id == key.id
    assert authenticator.authenticate([f"bearer  {shown} "], Scope.INFER).id == key.id
    refused = ([], [f"Bearer {other}"], [f"Basic {shown}"], [shown], ["Bearer"], ["Bearer "], [f"Bearer {shown}"] * 2, [f"Bearer {shown}x"])
    for credentials in refused:
        with pytest.raises(NotAuthenticated):
            authenticator.authenticate(credentials)


def test_a_key_is_good_for_its_scopes_only(path: Path) -> None:
    shown, key = new_key(scopes=["metrics"])
    write(path, key)
    authenticator = KeyAuthenticator(path)
    assert authenticator.authenticate([f"Bearer {shown}"], Scope.METRICS).id == key.id
    for scope in (Scope.INFER, Scope.ADMIN):
        with pytest.raises(NotAllowed, match=f"the scope '{scope}'"):
            authenticator.authenticate([f"Bearer {shown}"], scope)


def test_the_file_never_holds_a_key(path: Path) -> None:
    shown, key = new_key()
    write(path, key)
    assert shown not in path.read_text()
    assert shown.removeprefix("manta-") not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


def test_every_key_is_compared_whichever_is_right(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work, not the time: a count does not depend on the machine."""
    made = [new_key() for _ in range(5)]
    write(path, *(key for _, key in made))
    authenticator, compared = KeyAuthenticator(path), []
    real = auth.hmac.compare_digest
    monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: compared.append(1) or real(a, b))
    counts = set()
    for credentials in ([], ["Basic abc"], ["Bearer wrong"], ["Bearer a", "Bearer b"], *([f"Bearer {shown}"] for shown, _ in made)):
        compared.clear()
        with contextlib.suppress(NotAuthenticated):
            authenticator.authenticate(credentials)
        counts.add(len(compared))
    assert counts == {5}


def test_a_changed_file_is_seen_without_a_restart(path: Path) -> None:
    clock = Clock()
    (first, one), (second, two) = new_key(), new_key()
    write(path, one)
    authenticator = KeyAuthenticator(path, monotonic=clock)
    write(path, two)
    clock.now_s += auth.CHECK_INTERVAL_S
    assert authenticator.authenticate([f"Bearer {second}"]).id == two.id
    with pytest.raises(NotAuthenticated):
        authenticator.authenticate([f"Bearer {first}"])


def test_a_damaged_or_missing_file_leaves_the_keys_that_were_read_before(path: Path) -> None:
    clock = Clock()
    shown, key = new_key()
    write(path, key)
    authenticator = KeyAuthenticator(path, monotonic=clock)
    for damage in (lambda: path.write_text("{"), path.unlink):
        damage()
        clock.now_s += auth.CHECK_INTERVAL_S
        assert authenticator.authenticate([f"Bearer {shown}"]).id == key.id


def test_while_a_key_is_rotated_both_are_taken_and_then_only_the_new_one(path: Path) -> None:
    clock = Clock()
    old, key = new_key()
    new, turned = rotate_key(key, grace_s=3600)
    write(path, turned)
    authenticator = KeyAuthenticator(path, clock=clock)
    end = turned.secrets[1].until
    assert end is not None
    clock.now_s = end - 1
    assert authenticator.authenticate([f"Bearer {old}"]) == authenticator.authenticate([f"Bearer {new}"])
    clock.now_s = end
    assert authenticator.authenticate([f"Bearer {new}"]).id == key.id
    with pytest.raises(NotAuthenticated):
        authenticator.authenticate([f"Bearer {old}"])


def test_rotating_without_grace_forgets_the_old_secret() -> None:
    _, key = new_key()
    assert len(rotate_key(key, grace_s=0)[1].secrets) == 1


def test_the_salt_of_cached_prefixes_outlives_a_rotation_and_differs_between_keys() -> None:
    (_, one), (_, two) = new_key(), new_key()
    assert rotate_key(one, grace_s=0)[1].caller().salt == one.caller().salt
    assert one.caller().salt != two.caller().salt
    assert ANONYMOUS.salt == ""


def test_without_keys_anybody_may_do_everything() -> None:
    assert NoAuthentication().authenticate([], Scope.ADMIN) is ANONYMOUS


@pytest.mark.parametrize(
    "damage",
    [
        lambda document: document.update(version=2),
        lambda document: document.update(more=1),
        lambda document: document["keys"].append(document["keys"][0]),
        lambda document: document["keys"][0].update(scopes=["root"]),
        lambda document: document["keys"][0].update(scopes=[]),
        lambda document: document["keys"][0].update(secrets=[{"sha256": "zz"}]),
        lambda document: document["keys"][0].update(secrets=[{"sha256": "abcd"}]),
        lambda document: document["keys"][0].update(concurrency=0),
        lambda document: document["keys"][0].update(share=0),
        lambda document: document["keys"][0].update(share="much"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(path: Path, damage) -> None:
    _, key = new_key()
    write(path, key)
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(KeyFileError, match="cannot be used"):
        read_keys(path)


def test_a_server_does_not_start_without_its_key_file(path: Path) -> None:
    with pytest.raises(KeyFileError, match="cannot be read"):
        KeyAuthenticator(path)


def test_a_caller_does_not_show_its_key() -> None:
    shown, key = new_key(name="alice")
    assert shown not in repr(key)
    assert shown not in repr(dataclasses.asdict(key.caller()))
