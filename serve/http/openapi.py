"""/openapi.json: the bodies that the routes read themselves, because FastAPI's own parsing is lenient and answers 422."""

import json
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from serve.errors import WIRE
from serve.http.schema import Body
from serve.service_api import Offers

REFERENCE = "#/components/schemas/{model}"
BODIES: dict[type[Body], None] = {}
"""Those of all routes, in the order in which they were made."""
ERROR: dict[str, Any] = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": sorted({wire.type for wire in WIRE.values()})},
                "param": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "code": {"enum": sorted({wire.code for wire in WIRE.values()})},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
"""What every refusal and failure looks like (OpenAI's form)."""
REFUSED = {"description": "Refused or failed", "content": {"application/json": {"schema": {"$ref": REFERENCE.format(model="Error")}}}}
OF_FASTAPI = ("HTTPValidationError", "ValidationError")
"""Its own errors, of status 422, which none of our routes gives."""
COMMAND = 'python -c "from serve.http.openapi import page; print(page(), end=str())" > docs/openapi.json'


def takes(body: type[Body]) -> dict[str, Any]:
    """What a route says of its body."""
    BODIES[body] = None
    reference = {"$ref": REFERENCE.format(model=body.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def page() -> str:
    """docs/openapi.json."""
    from serve.http.app import create_app  # it imports this module

    async def no_metrics(accept: str) -> tuple[bytes, str]:
        raise NotImplementedError

    def no_service() -> Offers:
        raise NotImplementedError

    described = create_app(no_service, metrics=no_metrics).openapi()
    described["info"]["version"] = "1"  # of the API; the server's changes with every release
    return json.dumps(described, indent=1, sort_keys=True) + "\n"


def describe_api(app: FastAPI) -> None:
    """Let ``app.openapi()`` hold the bodies' schemas; made once, when first asked for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, definitions = models_json_schema([(body, "validation") for body in BODIES], ref_template=REFERENCE)
            schemas = schema.setdefault("components", {}).setdefault("schemas", {})
            schemas |= {**definitions["$defs"], "Error": ERROR}
            for name in OF_FASTAPI:
                schemas.pop(name, None)
            for operation in (each for path in schema["paths"].values() for each in path.values()):
                operation["responses"].pop("422", None)
                operation["responses"]["default"] = REFUSED
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
