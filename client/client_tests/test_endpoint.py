import pytest
from manta_client.endpoint import Access, Endpoint
from manta_client.errors import InsecureKey, InvalidEndpoint, InvalidKey


@pytest.mark.parametrize(
    ("text", "target", "secure"),
    [
        ("grpc://example.org:9000", "example.org:9000", False),
        ("grpcs://example.org:443/", "example.org:443", True),
        ("localhost:9000", "localhost:9000", False),
        ("grpc://[::1]:9000", "[::1]:9000", False),
    ],
)
def test_an_endpoint_is_read(text: str, target: str, secure: bool) -> None:
    endpoint = Endpoint.parse(text)
    assert (endpoint.target, endpoint.secure) == (target, secure)


@pytest.mark.parametrize(
    "text",
    [
        "http://example.org:80",
        "grpc://example.org",
        "grpc://:9000",
        "grpc://a:port",
        "grpc://a:1/path",
        "grpc://a:99999",
        "grpc://[::1",
        "[localhost]:9000",
    ],
)
def test_what_is_no_endpoint_is_refused_and_the_form_is_named(text: str) -> None:
    with pytest.raises(InvalidEndpoint, match="use grpc://host:port"):
        Endpoint.parse(text)


def resolve(endpoint: str | None = None, api_key: str | None = None, *, allow: bool = False, **environment: str) -> Access:
    return Access.resolve(endpoint, api_key, allow_insecure_key=allow, environment=environment)


def test_what_is_said_comes_before_the_environment_and_that_before_the_default() -> None:
    assert resolve().endpoint.target == "127.0.0.1:9000"
    assert resolve(MANTA_ENDPOINT="grpc://a:1").endpoint.target == "a:1"
    assert resolve("grpc://b:2", MANTA_ENDPOINT="grpc://a:1").endpoint.target == "b:2"
    assert resolve(MANTA_API_KEY="from-environment").metadata == (("authorization", "Bearer from-environment"),)
    assert resolve(api_key="said", MANTA_API_KEY="from-environment").metadata == (("authorization", "Bearer said"),)
    assert resolve().metadata == ()


def test_a_key_never_crosses_a_network_in_the_clear_unless_allowed() -> None:
    with pytest.raises(InsecureKey):
        resolve("grpc://example.org:9000", "key")
    with pytest.raises(InsecureKey):
        resolve("grpc://127.0.0.1.example.org:9000", "key")
    for place in ("grpcs://example.org:9000", "grpc://127.0.0.1:9000", "grpc://[::1]:9000", "grpc://localhost:9000"):
        assert resolve(place, "key").metadata
    assert resolve("grpc://example.org:9000", "key", allow=True).metadata


def test_the_key_is_not_in_what_is_printed() -> None:
    assert "secret" not in repr(resolve(api_key="secret"))


@pytest.mark.parametrize("key", ["schl\N{LATIN SMALL LETTER U WITH DIAERESIS}ssel", "manta-abc\n"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(InvalidKey, match="other than printable ASCII") as caught:
        resolve(api_key=key)
    assert key not in str(caught.value)
