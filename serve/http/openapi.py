"""/openapi.json: the bodies that the routes read themselves, because FastAPI's own parsing is lenient and answers 422."""

import json
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from serve.http.schema import Body
from serve.offers import Offers

REFERENCE = "#/components/schemas/{model}"
BODIES: dict[type[Body], None] = {}
"""Those of all routes, in the order in which they were made."""
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
            schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
