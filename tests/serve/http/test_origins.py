"""Web pages of other origins: which of them may ask, and read what they are answered."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from serve.config_sources import from_assignment, load
from serve.errors import NotAuthenticated
from serve.http.app import create_app
from serve.ray_serve_config import ray_serve_config_yaml
from tests.serve.http.conftest import ScriptedService

PAGE, OTHER = "https://chat.example.org", "https://evil.example.org"
CHAT = "/v1/chat/completions"
ASKS_FIRST = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type,x-session-id"}


class Locked:
    def authenticate(self, credentials: Any, scope: Any = None) -> Any:
        raise NotAuthenticated


def client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://manta")


@pytest.fixture
async def open_to_a_page(service: ScriptedService) -> AsyncIterator[httpx.AsyncClient]:
    async with client(create_app(lambda: service, allowed_origins=(PAGE,))) as opened:
        yield opened


async def test_the_page_that_is_allowed_may_ask_and_read(open_to_a_page: httpx.AsyncClient, chat_body: Any) -> None:
    before = await open_to_a_page.options(CHAT, headers={"origin": PAGE, **ASKS_FIRST})
    assert before.status_code == 200
    for stream in (False, True):
        answer = await open_to_a_page.post(CHAT, json=chat_body | {"stream": stream}, headers={"origin": PAGE})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == PAGE
    refused = await open_to_a_page.post(CHAT, json={}, headers={"origin": PAGE})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (400, PAGE)


async def test_another_page_may_not(open_to_a_page: httpx.AsyncClient, chat_body: Any) -> None:
    assert (await open_to_a_page.options(CHAT, headers={"origin": OTHER, **ASKS_FIRST})).status_code == 400
    answer = await open_to_a_page.post(CHAT, json=chat_body, headers={"origin": OTHER})
    assert "access-control-allow-origin" not in answer.headers


async def test_by_default_no_page_may(http: httpx.AsyncClient) -> None:
    before = await http.options(CHAT, headers={"origin": PAGE, **ASKS_FIRST})
    assert before.status_code == 405
    assert "access-control-allow-origin" not in before.headers


async def test_the_question_before_needs_no_key_and_the_request_does(service: ScriptedService, chat_body: Any) -> None:
    async with client(create_app(lambda: service, authenticator=Locked, allowed_origins=("*",))) as locked:
        assert (await locked.options(CHAT, headers={"origin": PAGE, **ASKS_FIRST})).status_code == 200
        answer = await locked.post(CHAT, json=chat_body, headers={"origin": PAGE})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, "*")
    assert service.asked == []


def test_the_setting_is_a_fronts_own_also_in_a_serve_config_file() -> None:
    loaded = load(flags=[from_assignment(f'http.allowed_origins=["{PAGE}"]'), from_assignment("http.port=8123")])
    assert loaded.config.http.allowed_origins == (PAGE,)
    assert f"allowed_origins:\n      - {PAGE}" in ray_serve_config_yaml(loaded, name="manta")
    assert "args" in ray_serve_config_yaml(loaded, name="manta")
