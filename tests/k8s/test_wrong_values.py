"""Values that are wrong are refused, with a sentence that says what to do."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.chart import Refused, with_values

WRONG = yaml.safe_load((Path(__file__).parent / "wrong.yaml").read_text())
BY_SCHEMA = WRONG[:21]
"""Refused before a template is looked at. The others are refused by our own sentences, which Helm only passes on."""


def test_there_are_enough_of_them() -> None:
    assert len(WRONG) >= 30


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: json.dumps(wrong["values"])[:60])
def test_it_is_refused(wrong: dict[str, Any]) -> None:
    assert_refused(wrong, "3")


@pytest.mark.parametrize("wrong", BY_SCHEMA, ids=lambda wrong: json.dumps(wrong["values"])[:60])
def test_helm_4_refuses_it_too(wrong: dict[str, Any]) -> None:
    assert_refused(wrong, "4")


def assert_refused(wrong: dict[str, Any], major: str) -> None:
    with pytest.raises(Refused) as refusal:
        with_values(wrong["values"], major=major)
    said = " ".join(refusal.value.said.split())
    assert re.search(wrong["says"], said, re.IGNORECASE), said
