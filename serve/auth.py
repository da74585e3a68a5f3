"""Place 2 of a request: who is calling. API keys, compared as digests, from a file that may change while the server runs."""

import hashlib
import hmac
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from serve.caller import ANONYMOUS, Caller, Scope
from serve.errors import NotAllowed, NotAuthenticated
from serve.key_file import Key, KeyFileError, read_keys

logger = logging.getLogger(__name__)

CHECK_INTERVAL_S = 1.0
"""How often the key file is checked for changes: a revoked key is refused at most this much later."""
SCHEME = "bearer"


class Authenticator(Protocol):
    """Finds the caller of a request by its credentials."""

    def authenticate(self, credentials: Sequence[str], scope: Scope | None = None) -> Caller:
        """``credentials``: the values of the request's `authorization` headers. ``scope`` None: any valid key is enough.

        Raises:
            NotAuthenticated: there is not exactly one value, it is not a bearer token, or no key that is valid now.
            NotAllowed: the key lacks the scope.
        """
        ...


class NoAuthentication:
    """The authenticator of a server without keys: every caller may do everything."""

    def authenticate(self, credentials: Sequence[str], scope: Scope | None = None) -> Caller:
        return ANONYMOUS


class KeyAuthenticator:
    """Authenticates by API key. Takes the same work whether a key is missing, malformed, wrong or right."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        """
        Raises:
            KeyFileError: the file cannot be used. (If it becomes unusable later, the keys read last stay valid.)
        """
        self._path, self._clock, self._monotonic = path, clock, monotonic
        self._keys: list[tuple[bytes, float | None, Caller]] = []
        """Digest of the key, when it expires (Unix time; None: never), and its owner."""
        self._loaded_stamp: tuple[int, int, int] | None = None
        self._checked_s = monotonic()
        self._load(self._stamp())

    def authenticate(self, credentials: Sequence[str], scope: Scope | None = None) -> Caller:
        """See `Authenticator`."""
        self._reload_if_changed()
        scheme, _, token = credentials[0].partition(" ") if len(credentials) == 1 else ("", "", "")
        caller = self._owner(token.strip(" "))
        if caller is None or scheme.lower() != SCHEME:
            raise NotAuthenticated
        if scope is not None and scope not in caller.scopes:
            raise NotAllowed(scope)
        return caller

    def _owner(self, token: str) -> Caller | None:
        """Compares every key, even after a match, so that the time taken reveals nothing."""
        digest, now, found = hashlib.sha256(token.encode(errors="replace")).digest(), self._clock(), None
        for known, until, caller in self._keys:
            if hmac.compare_digest(known, digest) and (until is None or now < until):
                found = caller
        return found

    def _reload_if_changed(self) -> None:
        now = self._monotonic()
        if now - self._checked_s < CHECK_INTERVAL_S:
            return
        self._checked_s = now
        try:
            stamp = self._stamp()
            if stamp != self._loaded_stamp:
                self._load(stamp)
        except KeyFileError as error:
            logger.error("%s; the keys that were read before stay valid", error)

    def _stamp(self) -> tuple[int, int, int]:
        """Changes when the file does."""
        try:
            facts = self._path.stat()  # follows links: Kubernetes updates a mounted secret by changing a link
        except OSError as error:
            raise KeyFileError(f"the key file {self._path} cannot be read: {error.strerror}") from None
        return facts.st_mtime_ns, facts.st_ino, facts.st_size

    def _load(self, stamp: tuple[int, int, int]) -> None:
        self._loaded_stamp = stamp  # set before reading: a damaged file is reported once, not every second
        keys: tuple[Key, ...] = read_keys(self._path)
        self._keys = [(secret.digest, secret.until, key.caller()) for key in keys for secret in key.secrets]
        logger.info("%d API keys read from %s", len(keys), self._path)
