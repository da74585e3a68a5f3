"""TLS and mutual TLS, with certificates that only these tests trust."""

import asyncio
import shutil
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from manta_client import AsyncClient, Unavailable

from serve.config import GrpcSettings
from serve.grpc.server import start_server
from serve.grpc.tls import TlsFiles
from tests.serve.grpc.certificates import Authority, Identity
from tests.serve.grpc.conftest import ScriptedService

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificates with openssl")
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@asynccontextmanager
async def secured(service: ScriptedService, identity: Identity, client_ca: Path | None = None) -> AsyncIterator[str]:
    files = TlsFiles(certificate=identity.certificate, key=identity.key, client_ca=client_ca)
    server, port = await start_server(service, "127.0.0.1:0", credentials=files.credentials())  # type: ignore[arg-type]
    try:
        yield f"grpcs://localhost:{port}"
    finally:
        await server.stop(grace=None)


async def ask(endpoint: str, authority: Authority, **more: bytes) -> str:
    roots = authority.certificate.read_bytes()
    async with AsyncClient(endpoint, api_key="secret", root_certificates=roots, max_retries=0, timeout=20, **more) as client:
        return (await client.chat.create(messages=MESSAGES)).text


async def test_a_trusted_server_is_talked_to_and_gets_the_key(service: ScriptedService, authority: Authority) -> None:
    async with secured(service, authority.signs("server")) as endpoint:
        assert await ask(endpoint, authority) == "Hé!"


async def test_a_server_nobody_vouches_for_is_not_talked_to(service: ScriptedService, authority: Authority, tmp_path: Path) -> None:
    async with secured(service, authority.signs("server")) as endpoint:
        with pytest.raises(Unavailable):
            await ask(endpoint, Authority(tmp_path / "other"))
    assert service.asked == []


async def test_with_mutual_tls_only_known_clients_are_let_in(service: ScriptedService, authority: Authority, tmp_path: Path) -> None:
    def as_client(identity: Identity) -> dict[str, bytes]:
        return {"client_certificate": identity.certificate.read_bytes(), "client_key": identity.key.read_bytes()}

    clients, strangers = Authority(tmp_path / "clients"), Authority(tmp_path / "strangers")
    async with secured(service, authority.signs("server"), client_ca=clients.certificate) as endpoint:
        assert await ask(endpoint, authority, **as_client(clients.signs("client"))) == "Hé!"
        for unknown in ({}, as_client(strangers.signs("client"))):
            with pytest.raises(Unavailable):
                await ask(endpoint, authority, **unknown)
    assert len(service.asked) == 1


def spoil(identity: Identity) -> None:
    identity.certificate.write_text("no certificate")


def remove(identity: Identity) -> None:
    identity.key.unlink()


async def test_a_renewed_certificate_is_shown_to_the_next_connection(service: ScriptedService, authority: Authority) -> None:
    identity, renewed = authority.signs("server"), authority.signs("renewed")
    async with secured(service, identity) as endpoint:
        before = await ask_for_certificate(endpoint)
        renewed.key.replace(identity.key)
        renewed.certificate.replace(identity.certificate)
        after = await ask_for_certificate(endpoint)
        assert after != before
        assert after == ssl.PEM_cert_to_DER_cert(identity.certificate.read_text())
        assert await ask(endpoint, authority) == "Hé!"


@pytest.mark.parametrize("accident", [spoil, remove])
async def test_a_spoilt_renewal_leaves_the_last_good_certificate_in_use(
    service: ScriptedService, authority: Authority, accident: Callable[[Identity], None]
) -> None:
    identity = authority.signs("server")
    async with secured(service, identity) as endpoint:
        before = await ask_for_certificate(endpoint)
        accident(identity)
        assert await ask_for_certificate(endpoint) == before
        assert await ask(endpoint, authority) == "Hé!"


async def ask_for_certificate(endpoint: str) -> bytes:
    """What the server shows, as DER."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    port = int(endpoint.rpartition(":")[2])
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return bytes(certificate)


def test_files_that_are_no_certificates_are_refused_by_name(authority: Authority) -> None:
    identity = authority.signs("server")
    with pytest.raises(ValueError, match=r"server-key\.pem holds no PEM block of a certificate"):
        TlsFiles(certificate=identity.key, key=identity.key).credentials()
    with pytest.raises(OSError, match="nowhere"):
        TlsFiles(certificate="nowhere", key=identity.key).credentials()


@pytest.mark.parametrize("half", [{"certificate": "c"}, {"key": "k"}, {"client_ca": "a"}])
def test_half_of_tls_is_refused(half: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="need"):
        GrpcSettings(**half)
