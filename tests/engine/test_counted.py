"""One of a thing is not several."""

import pytest

from cluster.errors import ReplicaLost
from engine.counted import counted
from engine.errors import QueueFull
from serve.errors import QuotaExceeded


@pytest.mark.parametrize(("number", "written"), [(0, "0 tokens"), (1, "1 token"), (2, "2 tokens"), (1024, "1024 tokens")])
def test_a_number_of_things(number: int, written: str) -> None:
    assert counted(number, "token") == written


@pytest.mark.parametrize(("number", "written"), [(1, "1 entry is"), (3, "3 entries are")])
def test_a_plural_of_another_form(number: int, written: str) -> None:
    assert counted(number, "entry is", "entries are") == written


def test_messages_of_one() -> None:
    assert "quota of 1 request per minute;" in str(QuotaExceeded("requests per minute", limit=1, retry_after_s=1))
    assert "quota of 2 requests at the same time;" in str(QuotaExceeded("requests at the same time", limit=2, retry_after_s=1))
    assert str(QueueFull(limit=1)).startswith("1 request is waiting")
    assert "was lost 1 time with" in str(ReplicaLost(attempts=1, last="x"))
