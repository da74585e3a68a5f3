"""A head that is not there is told at once."""

import socket

import pytest

from cluster.joining import CannotJoin, joined


def test_a_head_that_takes_no_connection_is_not_waited_for() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"  # bound, and nobody listens
        with (
            pytest.raises(CannotJoin, match=f"{address} could not be joined: its head takes no connection at .*refused"),
            joined(address, namespace="manta"),
        ):
            pass
