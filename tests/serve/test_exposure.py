"""Whoever opens a server to others is told what that means."""

import pytest

from serve.config import ServeConfig
from serve.exposure import exposure

KEYS = {"auth": {"keys_file": "keys.json"}}
TLS = {"certificate": "tls.crt", "key": "tls.key"}


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.2"])
def test_on_loopback_nothing_is_said(host: str) -> None:
    assert exposure(ServeConfig.model_validate({"http": {"host": host}, "grpc": {"host": host}})) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "gpu-7.example"])
@pytest.mark.parametrize("front", ["http", "grpc"])
def test_a_server_without_keys_that_others_reach_is_told_so(front: str, host: str) -> None:
    (told,) = exposure(ServeConfig.model_validate({front: {"host": host}}))
    name = {"http": "HTTP", "grpc": "gRPC"}[front]
    assert f"{name} listens on {'every address of this machine' if host in ('0.0.0.0', '::') else host}:" in told
    assert "127.0.0.1" not in told
    assert ("drain" in told) == (front == "grpc")
    assert "auth.keys_file" in told


def test_keys_in_the_clear_are_told_and_keys_under_tls_are_not() -> None:
    (told,) = exposure(ServeConfig.model_validate(KEYS | {"grpc": {"host": "0.0.0.0"}}))
    assert "in the clear" in told
    assert exposure(ServeConfig.model_validate(KEYS | {"grpc": {"host": "0.0.0.0"} | TLS})) == []
    assert exposure(ServeConfig.model_validate(KEYS | {"http": {"host": "0.0.0.0"}})) == []


def test_two_fronts_on_one_address_are_told_of_together() -> None:
    (told,) = exposure(ServeConfig.model_validate({"http": {"host": "0.0.0.0"}, "grpc": {"host": "0.0.0.0"}}))
    assert "HTTP and gRPC listen on every address of this machine:" in told
