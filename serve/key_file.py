"""The file of API keys: their SHA-256 hashes, scopes and quotas, never the keys themselves."""

import contextlib
import fcntl
import hashlib
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from serve.caller import Caller, Quota, Scope

PREFIX = "manta-"
SECRET_BYTES = 32
MAX_FILE_BYTES = 8 * 1024 * 1024
MAX_SHARE = 1_000_000.0


class KeyFileError(ValueError):
    """The key file cannot be used; the message says why."""


class Secret(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The hash of one valid secret of a key."""

    sha256: str
    """Hexadecimal."""
    until: float | None = None
    """Unix time at which it expires. None = never."""

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.sha256)


class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The key of one client. It has two secrets while it is being rotated."""

    id: str
    name: str = ""
    created: float
    scopes: tuple[Scope, ...] = (Scope.INFER,)
    secrets: tuple[Secret, ...]
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    share: float = 1.0

    def caller(self) -> Caller:
        quota = Quota(requests_per_minute=self.requests_per_minute, tokens_per_minute=self.tokens_per_minute, concurrency=self.concurrency)
        return Caller(id=self.id, scopes=frozenset(self.scopes), quota=quota, share=self.share)


class _Document(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    version: int = 1
    keys: tuple[Key, ...] = ()


def new_secret() -> tuple[str, str]:
    """A new key, to be shown once, and its SHA-256."""
    key = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    return key, hashlib.sha256(key.encode()).hexdigest()


def new_key(**fields: object) -> tuple[str, Key]:
    """A new key, to be shown once, and its entry for the file. ``fields``: fields of `Key` other than id, created and secrets.

    Raises:
        KeyFileError: a field has an invalid value.
    """
    shown, digest = new_secret()
    raw = {"id": secrets.token_hex(6), "created": round(time.time()), "secrets": [{"sha256": digest}], **fields}
    try:
        key = msgspec.convert(raw, Key)
    except msgspec.ValidationError as error:
        raise KeyFileError(str(error)) from None
    return shown, _checked(key)


def rotate_key(key: Key, *, grace_s: float) -> tuple[str, Key]:
    """A new secret for the same key; the old ones stay valid for at most ``grace_s``."""
    shown, digest = new_secret()
    end = time.time() + grace_s
    old = (Secret(sha256=s.sha256, until=end if s.until is None else min(s.until, end)) for s in key.secrets)
    alive = tuple(secret for secret in old if secret.until is not None and secret.until > time.time())
    return shown, msgspec.structs.replace(key, secrets=(Secret(sha256=digest), *alive))


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a key file.

    Raises:
        KeyFileError: the file does not exist, cannot be read, or has invalid content.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"the key file {path} cannot be read: {error.strerror}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise KeyFileError(f"the key file {path} has more than {MAX_FILE_BYTES} bytes")
    try:
        document = msgspec.json.decode(raw, type=_Document)
        if document.version != 1:
            raise ValueError(f"it is of version {document.version}, this program reads version 1")
        keys = tuple(_checked(key) for key in document.keys)
        if len({key.id for key in keys}) < len(keys):
            raise ValueError("two keys have the same id")
    except (msgspec.DecodeError, ValueError) as error:  # KeyFileError is one
        raise KeyFileError(f"the key file {path} cannot be used: {error}") from None
    return keys


def _checked(key: Key) -> Key:
    if not key.id or not key.scopes or not key.secrets:
        raise KeyFileError("a key needs an id, a scope and a secret")
    if not 0 < key.share <= MAX_SHARE:
        raise KeyFileError(f"a key's share must be above 0 and at most {MAX_SHARE:g}, got {key.share}")
    try:
        key.caller()
        if any(len(secret.digest) != hashlib.sha256().digest_size for secret in key.secrets):
            raise ValueError("a SHA-256 has 64 hexadecimal digits")
    except ValueError as error:
        raise KeyFileError(f"key {key.id}: {error}") from None
    return key


@contextmanager
def locked_key_file(path: Path) -> Iterator[Callable[[tuple[Key, ...]], None]]:
    """Lock the key file against other writers. Yields a function that replaces its keys atomically: readers see the old or the new file.

    A new file gets mode 0600; an existing one keeps its permissions.

    Raises:
        KeyFileError: the file, or the one beside it that is locked, cannot be written.
    """
    with contextlib.ExitStack() as held:
        with _said_of(path):
            lock = held.enter_context(open(f"{path}.lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lambda keys: _write(path, keys)


@contextmanager
def _said_of(path: Path) -> Iterator[None]:
    """An error while the key file is written is told of ``path``, not of the lock or of the copy beside it."""
    try:
        yield
    except OSError as error:
        raise KeyFileError(f"the key file {path} cannot be written: {error.strerror}") from error


def _write(path: Path, keys: tuple[Key, ...]) -> None:
    with _said_of(path):
        _replace(path, keys)


def _replace(path: Path, keys: tuple[Key, ...]) -> None:
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    text = msgspec.json.format(msgspec.json.encode(_Document(keys=keys)), indent=2)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, mode)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
