"""The gRPC port of a real server, with mutual TLS."""

import shutil
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from manta_client import Client, Unavailable

from tests.serve.grpc.certificates import Authority
from tests.system.server import serving

pytestmark = [
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificates with openssl"),
]


def test_only_clients_with_a_certificate_are_served_and_a_renewed_one_is_shown(demo_folder: Path, tmp_path: Path) -> None:
    servers, clients = Authority(tmp_path / "servers"), Authority(tmp_path / "clients")
    server, renewed, own = servers.signs("server"), Authority(tmp_path / "new").signs("server"), clients.signs("client")
    files = {"certificate": server.certificate, "key": server.key, "client_ca": clients.certificate}
    settings = [part for name, file in files.items() for part in ("--set", f"grpc.{name}={file}")]
    with serving(str(demo_folder), "--name", "demo", *settings) as running:
        assert any(f"grpcs://127.0.0.1:{running.grpc_port}" in line for line in running.lines)
        endpoint, roots = f"grpcs://localhost:{running.grpc_port}", servers.certificate.read_bytes()
        identity = {"client_certificate": own.certificate.read_bytes(), "client_key": own.key.read_bytes()}
        with Client(endpoint, root_certificates=roots, timeout=60, **identity) as client:
            assert client.chat.create(messages=[{"role": "user", "content": "Hi"}], max_tokens=4).text
        with Client(endpoint, root_certificates=roots, max_retries=0, timeout=20) as stranger, pytest.raises(Unavailable):
            stranger.models.list()
        credentials = grpc.ssl_channel_credentials(roots, own.key.read_bytes(), own.certificate.read_bytes())
        with grpc.secure_channel(f"localhost:{running.grpc_port}", credentials) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        renewed.key.replace(server.key)
        renewed.certificate.replace(server.certificate)
        new_roots = (tmp_path / "new/ca.pem").read_bytes()
        with Client(endpoint, root_certificates=new_roots, timeout=60, **identity) as client:
            assert [model.id for model in client.models.list()] == ["demo"]
