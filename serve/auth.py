"""Step 2 of a request: who asks. API keys, compared as digests, from a file that may change while the server runs."""

import hashlib
import hmac
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from serve.caller import ANYONE, Caller, Scope
from serve.errors import NotAllowed, NotAuthenticated
from serve.key_file import Key, KeyFileError, read_keys

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
"""How old the list of keys may be: a key that is revoked is refused this much later at the most."""
SCHEME = "bearer"


class OpenDoor:
    """Where no keys are configured: whoever reaches the server may do everything."""

    def admit(self, credentials: Sequence[str], scope: Scope | None = None) -> Caller:
        return ANYONE


class Doorkeeper:
    """Admits the owners of keys. Every answer takes the same work, whether a key is missing, malformed, wrong or right."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        """
        Raises:
            KeyFileError: the file cannot be used. (Later on, that leaves the keys that were read last.)
        """
        self._path, self._clock, self._monotonic = path, clock, monotonic
        self._keys: list[tuple[bytes, float | None, Caller]] = []
        self._seen: tuple[int, int, int] | None = None
        self._looked_s = monotonic()
        self._load(self._stamp())

    def admit(self, credentials: Sequence[str], scope: Scope | None = None) -> Caller:
        """The caller whom the values of the request's `authorization` headers show. ``scope`` None: any key will do.

        Raises:
            NotAuthenticated: there is not exactly one value, it is no bearer token, or no key that is valid now.
            NotAllowed: the key is not for this.
        """
        self._look()
        scheme, _, token = credentials[0].partition(" ") if len(credentials) == 1 else ("", "", "")
        caller = self._owner(token.strip(" "))
        if caller is None or scheme.lower() != SCHEME:
            raise NotAuthenticated
        if scope is not None and scope not in caller.scopes:
            raise NotAllowed(scope)
        return caller

    def _owner(self, token: str) -> Caller | None:
        """Looks at every key, also behind the right one."""
        digest, now, found = hashlib.sha256(token.encode(errors="replace")).digest(), self._clock(), None
        for known, until, caller in self._keys:
            if hmac.compare_digest(known, digest) and (until is None or now < until):
                found = caller
        return found

    def _look(self) -> None:
        now = self._monotonic()
        if now - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = now
        try:
            stamp = self._stamp()
            if stamp != self._seen:
                self._load(stamp)
        except KeyFileError as error:
            logger.error("%s; the keys that were read before stay valid", error)

    def _stamp(self) -> tuple[int, int, int]:
        try:
            facts = self._path.stat()  # follows links: Kubernetes changes a mounted secret by changing a link
        except OSError as error:
            raise KeyFileError(f"the key file {self._path} cannot be read: {error.strerror}") from None
        return facts.st_mtime_ns, facts.st_ino, facts.st_size

    def _load(self, stamp: tuple[int, int, int]) -> None:
        self._seen = stamp  # also if it is damaged: said once, not every second
        keys: tuple[Key, ...] = read_keys(self._path)
        self._keys = [(secret.digest, secret.until, key.caller()) for key in keys for secret in key.secrets]
        logger.info("%d API keys read from %s", len(keys), self._path)
