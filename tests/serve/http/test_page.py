"""docs/http.md, which people read in place of openapi.json, leaves nothing out."""

import json
import re
from pathlib import Path

import pytest

from serve.errors import ERROR_MAPPINGS
from serve.http.headers import DEADLINE_MS, PRIORITY, TIMING
from serve.http.schema import ChatBody, CompletionBody
from serve.idempotency import IDEMPOTENCY_KEY
from serve.session import SESSION_HEADER

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "http.md").read_text()


def test_every_path_is_on_it() -> None:
    paths = {re.sub("{.*}", "{name}", path) for path in json.loads((DOCS / "openapi.json").read_text())["paths"]}
    assert {path for path in paths if f"{path}`" not in PAGE} == set()


@pytest.mark.parametrize("body", [ChatBody, CompletionBody])
def test_every_field_is_on_it(body: type[ChatBody] | type[CompletionBody]) -> None:
    assert {name for name in body.model_fields if f"`{name}`" not in PAGE} == set()


def test_every_header_is_on_it() -> None:
    assert {name for name in (DEADLINE_MS, TIMING, PRIORITY, IDEMPOTENCY_KEY, SESSION_HEADER) if f"`{name}" not in PAGE} == set()


def test_every_error_is_on_it_as_both_fronts_tell_it() -> None:
    told = re.findall(r"^\| (\d+) \| `(\w+)` \| (\w+) \|", PAGE, re.MULTILINE)
    assert told == sorted({(str(wire.http), wire.code, wire.grpc) for wire in ERROR_MAPPINGS.values()})
