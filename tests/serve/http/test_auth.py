"""Who is let in over HTTP, and what quotas tell."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from serve.auth import KeyAuthenticator
from serve.errors import InvalidRequest
from serve.http.app import create_app
from serve.key_file import locked_key_file, new_key
from serve.limits import Limits
from serve.quotas import Quotas
from serve.validation import check_priority

OPEN = ("/livez", "/readyz")
CLOSED = (
    "/health",
    "/v1/models",
    "/v1/chat/completions",
    "/metrics",
    "/openapi.json",
    "/nowhere",
    "/livez/",
    "//livez",
    "/LIVEZ",
)


class Keys:
    def __init__(self, path: Path) -> None:
        made = {
            "infer": new_key(),
            "metrics": new_key(scopes=["metrics"]),
            "admin": new_key(scopes=["admin"]),
            "few": new_key(requests_per_minute=1),
        }
        with locked_key_file(path) as write:
            write(tuple(key for _, key in made.values()))
        self.shown = {name: shown for name, (shown, _) in made.items()}
        self.ids = {name: key.id for name, (_, key) in made.items()}

    def header(self, name: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.shown[name]}"}


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys.json")


@pytest.fixture
async def locked(keys: Keys, tmp_path: Path, service) -> AsyncIterator[httpx.AsyncClient]:
    async def page(accept: str) -> tuple[bytes, str]:
        return b"# nothing\n", "text/plain"

    authenticator, quotas = KeyAuthenticator(tmp_path / "keys.json"), Quotas()
    app = create_app(lambda: service, Limits(), metrics=page, authenticator=lambda: authenticator, quota_headers=quotas.headers)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://manta") as client:
        yield client


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("authorization", "Bearer wrong")],
        [("authorization", "Basic bWFudGE6a2V5")],
        [("authorization", "Bearer")],
        [("authorization", "")],
    ],
)
async def test_every_path_but_two_needs_a_key(locked: httpx.AsyncClient, path: str, headers: list[tuple[str, str]]) -> None:
    answer = await locked.request("GET", httpx.URL("http://manta").copy_with(raw_path=path.encode()), headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert "wrong" not in answer.text


@pytest.mark.parametrize("path", OPEN)
async def test_probes_need_none(locked: httpx.AsyncClient, path: str) -> None:
    assert (await locked.get(path)).status_code == 200


async def test_two_keys_are_as_good_as_none(locked: httpx.AsyncClient, keys: Keys) -> None:
    headers = [("authorization", f"Bearer {keys.shown['infer']}")] * 2
    assert (await locked.get("/v1/models", headers=headers)).status_code == 401


@pytest.mark.parametrize(
    ("key", "path", "status"),
    [
        ("infer", "/v1/models", 200),
        ("infer", "/metrics", 403),
        ("metrics", "/metrics", 200),
        ("metrics", "/v1/models", 403),
        ("metrics", "/health", 200),
        ("admin", "/v1/models", 403),
        ("admin", "/openapi.json", 200),
        ("infer", "/nowhere", 404),
        ("infer", "/admin/drain", 403),
    ],
)
async def test_a_key_opens_the_paths_of_its_scopes(locked: httpx.AsyncClient, keys: Keys, key: str, path: str, status: int) -> None:
    assert (await locked.get(path, headers=keys.header(key))).status_code == status


async def test_the_service_hears_whose_request_it_is(locked: httpx.AsyncClient, keys: Keys, service, chat_body) -> None:
    await locked.post("/v1/chat/completions", json=chat_body, headers=keys.header("infer"))
    assert service.asked[0].caller.id == keys.ids["infer"]


async def test_answers_tell_what_is_left_of_a_quota(locked: httpx.AsyncClient, keys: Keys, chat_body) -> None:
    limited = await locked.post("/v1/chat/completions", json=chat_body, headers=keys.header("few"))
    assert limited.headers["x-ratelimit-limit-requests"] == "1"
    unlimited = await locked.post("/v1/chat/completions", json=chat_body, headers=keys.header("infer"))
    assert not [name for name in unlimited.headers if name.startswith("x-ratelimit")]


async def test_refusals_tell_what_is_left_of_a_quota_too(locked: httpx.AsyncClient, keys: Keys) -> None:
    refused = await locked.post("/v1/chat/completions", json={}, headers=keys.header("few"))
    assert (refused.status_code, refused.headers["x-ratelimit-limit-requests"]) == (400, "1")


@pytest.mark.parametrize("asked", ["1001", "-1001", "high"])
async def test_a_priority_is_refused_in_the_same_words_wherever_it_is_given(http: httpx.AsyncClient, chat_body, asked: str) -> None:
    """gRPC's field passes the same check (`tests.serve.bad_input`)."""
    header = (await http.post("/v1/chat/completions", json=chat_body, headers={"x-priority": asked})).json()["error"]
    with pytest.raises(InvalidRequest) as raised:
        check_priority(int(asked) if asked != "high" else asked, Limits())
    assert header["message"] == f"x-{raised.value.message}" == "x-priority must be a whole number from -1000 to 1000"


async def test_priority_and_deadline_come_in_headers(http: httpx.AsyncClient, service, chat_body) -> None:
    await http.post("/v1/chat/completions", json=chat_body, headers={"x-priority": "-3", "x-deadline-ms": "60000"})
    assert service.asked[0].priority == -3
    assert service.asked[0].deadline_s is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-priority", "high"),
        ("x-priority", "1001"),
        ("x-priority", "1.5"),
        ("x-deadline-ms", "0"),
        ("x-deadline-ms", "-5"),
        ("x-deadline-ms", ""),
    ],
)
async def test_a_header_that_is_no_such_number_is_refused_by_name(http: httpx.AsyncClient, chat_body, name: str, value: str) -> None:
    answer = await http.post("/v1/chat/completions", json=chat_body, headers={name: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name
