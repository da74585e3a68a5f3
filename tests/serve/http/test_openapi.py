"""docs/openapi.json is what the routes say now."""

import json
from pathlib import Path

from serve.http.openapi import COMMAND, page

PAGE = Path(__file__).parents[3] / "docs" / "openapi.json"


def test_the_document_is_what_the_routes_say() -> None:
    assert PAGE.read_text() == page(), f"the routes say something else now; read the difference, then: {COMMAND}"


def test_every_reference_leads_somewhere() -> None:
    text = page()
    schemas = json.loads(text)["components"]["schemas"]
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= schemas.keys()


def test_refusals_have_the_form_that_they_have_and_no_other() -> None:
    document = json.loads(page())
    for operation in (each for path in document["paths"].values() for each in path.values()):
        assert operation["responses"].keys() == {"200", "default"}
    assert not {"HTTPValidationError", "ValidationError"} & document["components"]["schemas"].keys()
