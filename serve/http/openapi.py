"""/openapi.json: adds the schemas of bodies, which the routes parse themselves because FastAPI's parsing is lenient and answers 422."""

import json
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from serve.errors import ERROR_MAPPINGS
from serve.http.schema import Body
from serve.service_api import ServiceApi

REFERENCE = "#/components/schemas/{model}"
BODIES: dict[type[Body], None] = {}
"""The bodies of all routes, in the order of their registration."""
ERROR: dict[str, Any] = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": sorted({mapping.type for mapping in ERROR_MAPPINGS.values()})},
                "param": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "code": {"enum": sorted({mapping.code for mapping in ERROR_MAPPINGS.values()})},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
"""The body of every error (OpenAI's form)."""
ERROR_RESPONSE = {
    "description": "Refused or failed",
    "content": {"application/json": {"schema": {"$ref": REFERENCE.format(model="Error")}}},
}
FASTAPI_ERRORS = ("HTTPValidationError", "ValidationError")
"""FastAPI's schemas for status 422, which none of our routes returns."""
COMMAND = 'python -c "from serve.http.openapi import page; print(page(), end=str())" > docs/openapi.json'


def json_body(body: type[Body]) -> dict[str, Any]:
    """The ``openapi_extra`` of a route with this body."""
    BODIES[body] = None
    reference = {"$ref": REFERENCE.format(model=body.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def page() -> str:
    """The content of docs/openapi.json."""
    from serve.http.app import create_app  # it imports this module

    async def no_metrics(accept: str) -> tuple[bytes, str]:
        raise NotImplementedError

    def no_service() -> ServiceApi:
        raise NotImplementedError

    described = create_app(no_service, metrics=no_metrics).openapi()
    described["info"]["version"] = "1"  # of the API: the version of the server changes with every release
    return json.dumps(described, indent=1, sort_keys=True) + "\n"


def describe_api(app: FastAPI) -> None:
    """Make ``app.openapi()`` include the schemas of the bodies. It is computed once, at the first call."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, definitions = models_json_schema([(body, "validation") for body in BODIES], ref_template=REFERENCE)
            schemas = schema.setdefault("components", {}).setdefault("schemas", {})
            schemas |= {**definitions["$defs"], "Error": ERROR}
            for name in FASTAPI_ERRORS:
                schemas.pop(name, None)
            for operation in (each for path in schema["paths"].values() for each in path.values()):
                operation["responses"].pop("422", None)
                operation["responses"]["default"] = ERROR_RESPONSE
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
