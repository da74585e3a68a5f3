"""Bytes that are no message of the protocol: the client's mistake, over a plain server."""

import copy
import pickle

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.errors import InvalidRequest
from serve.grpc.decode_errors import UndecodableMessage
from tests.serve.bad_input.checks import details_of, says_little
from tests.serve.grpc.test_fuzz import MINE
from tests.serve.in_process import Fronts

METHODS = ("Chat", "ChatStream", "Generate", "GenerateStream", "GetModel", "Tokenize", "Detokenize")
ADMIN = ("Abort",)


async def call(address: str, service: str, method: str, raw: bytes) -> str:
    """The status; what it says has to be little."""
    async with grpc.aio.insecure_channel(address) as channel:
        kind = channel.unary_stream if method.endswith("Stream") else channel.unary_unary
        answer = kind(f"/manta.v1.{service}/{method}")(raw, timeout=60)
        try:
            if method.endswith("Stream"):
                async for _ in answer:
                    pass
            else:
                await answer
        except grpc.aio.AioRpcError as error:
            refusal = error
        else:
            return "OK"
    says_little(refusal.details() or "")
    assert "protobuf.message" not in (refusal.details() or "")
    assert details_of(refusal)["ErrorInfo"].domain == "manta"
    return str(refusal.code().name)


@pytest.mark.parametrize("raw", [b"\xff\xff\xff", b"hello", b"\x0a\xff", b"\x0a\x02\xff\xfe"], ids=repr)
async def test_what_cannot_be_read_is_refused_by_every_call(both: Fronts, raw: bytes) -> None:
    address = both.grpc.removeprefix("grpc://")
    for service, methods in (("MantaService", METHODS), ("AdminService", ADMIN)):
        for method in methods:
            assert await call(address, service, method, raw) == "INVALID_ARGUMENT", method
    assert both.source.is_idle


async def test_any_bytes_are_answered_or_refused(both: Fronts) -> None:
    examples: list[tuple[str, bytes]] = []

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.sampled_from(METHODS), st.binary(max_size=60))
    def made(method: str, raw: bytes) -> None:
        examples.append((method, raw))

    made()
    for method, raw in examples:
        status = await call(both.grpc.removeprefix("grpc://"), "MantaService", method, raw)
        assert status in {"OK", *MINE}, (method, raw)
    assert both.source.is_idle


def test_it_can_cross_to_another_process_and_refuses_there() -> None:
    for there in (pickle.loads(pickle.dumps(UndecodableMessage())), copy.deepcopy(UndecodableMessage())):
        with pytest.raises(InvalidRequest):
            _ = there.model
