"""For pytest: `pytest_plugins = ["manta_client.testing.fixtures"]` in the topmost conftest.py, then ask for `manta_server`."""

from collections.abc import Iterator

import pytest

from .server import FakeServer


@pytest.fixture
def manta_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """A fake server. `Client()` without arguments connects to it."""
    with FakeServer() as server:
        monkeypatch.setenv("MANTA_ENDPOINT", server.endpoint)
        monkeypatch.delenv("MANTA_API_KEY", raising=False)
        yield server
