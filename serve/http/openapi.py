"""/openapi.json: the bodies that the routes read themselves, because FastAPI's own parsing is lenient and answers 422."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from serve.http.schema import ChatBody, CompletionBody, SharedBody

REFERENCE = "#/components/schemas/{model}"


def takes(body: type[SharedBody]) -> dict[str, Any]:
    """What a route says of its body."""
    reference = {"$ref": REFERENCE.format(model=body.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def describe_api(app: FastAPI) -> None:
    """Let ``app.openapi()`` hold the bodies' schemas; made once, when first asked for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, definitions = models_json_schema([(ChatBody, "validation"), (CompletionBody, "validation")], ref_template=REFERENCE)
            schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
