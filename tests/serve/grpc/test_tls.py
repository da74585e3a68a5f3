"""A connection over TLS, with a certificate that only this test trusts."""

import shutil
import subprocess
from pathlib import Path

import grpc
import pytest
from manta_client import AsyncClient, Unavailable

from serve.grpc.server import start_server
from tests.serve.grpc.conftest import ScriptedService

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[bytes, bytes]:
    """(private key, certificate) for localhost, as PEM."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return key.read_bytes(), certificate.read_bytes()


async def test_a_trusted_server_is_talked_to_and_gets_the_key(service: ScriptedService, certificate: tuple[bytes, bytes]) -> None:
    server, port = await start_server(service, "127.0.0.1:0", credentials=grpc.ssl_server_credentials([certificate]))  # type: ignore[arg-type]
    try:
        async with AsyncClient(f"grpcs://localhost:{port}", api_key="secret", root_certificates=certificate[1]) as client:
            assert (await client.chat.create(messages=MESSAGES)).text == "Hé!"
    finally:
        await server.stop(grace=None)


async def test_a_server_nobody_vouches_for_is_not_talked_to(service: ScriptedService, certificate: tuple[bytes, bytes]) -> None:
    server, port = await start_server(service, "127.0.0.1:0", credentials=grpc.ssl_server_credentials([certificate]))  # type: ignore[arg-type]
    try:
        async with AsyncClient(f"grpcs://localhost:{port}", max_retries=0, timeout=10) as client:
            with pytest.raises(Unavailable):
                await client.chat.create(messages=MESSAGES)
    finally:
        await server.stop(grace=None)
    assert service.asked == []
