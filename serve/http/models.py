"""GET /v1/models: the models of this server."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from serve.http.context import HttpApi
from serve.http.errors import json_response
from serve.model_facts import ModelFacts


def model_routes(api: HttpApi) -> APIRouter:
    routes = APIRouter()

    @routes.head("/v1/models", include_in_schema=False)
    @routes.get("/v1/models")
    async def list_models() -> Response:
        return json_response({"object": "list", "data": [model_object(facts) for facts in api.service().models()]})

    @routes.head("/v1/models/{name:path}", include_in_schema=False)
    @routes.get("/v1/models/{name:path}")  # names may contain slashes
    async def retrieve_model(name: str) -> Response:
        return json_response(model_object(api.service().model(name)))

    return routes


def model_object(facts: ModelFacts) -> dict[str, Any]:
    return {
        "id": facts.name,
        "object": "model",
        "created": facts.created,
        "owned_by": "manta",
        "root": facts.root,
        "parent": facts.parent,
        "max_model_len": facts.max_context_tokens,
    }
