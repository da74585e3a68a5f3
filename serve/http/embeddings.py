"""Places 1 and 14 of a request for embeddings over HTTP: POST /v1/embeddings."""

import base64
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter
from pydantic import BeforeValidator, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from engine.request_trace import trace_place
from serve.hold_header import hold_headers
from serve.http.context import HttpApi, RequestContext
from serve.http.disconnect import cancel_on_disconnect
from serve.http.errors import json_response
from serve.http.field_parsers import parse_prompts
from serve.http.openapi import json_body
from serve.http.schema import PROMPTS, ModelBody
from serve.request import EmbeddingRequest, EmbeddingResult


class EmbeddingBody(ModelBody):
    """Body of /v1/embeddings."""

    input: Annotated[list[str | list[int]], BeforeValidator(parse_prompts), WithJsonSchema(PROMPTS)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None

    def request(self, request_id: str) -> EmbeddingRequest:
        inputs = tuple(one if isinstance(one, str) else tuple(one) for one in self.input)
        return EmbeddingRequest(request_id=request_id, model=self.model, inputs=inputs, dimensions=self.dimensions)


def embedding_routes(api: HttpApi) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/embeddings", openapi_extra=json_body(EmbeddingBody))
    async def create_embedding(request: Request) -> Response:
        body, context, headers = await api.receive(request, EmbeddingBody, id_prefix="embd-")
        embedding = context.apply_to(body.request(context.id))
        result = await cancel_on_disconnect(request.receive, api.service().embed(embedding))
        response = json_response(embedding_list(context, body, result), headers=headers | hold_headers(result.held_s))
        trace_place(14, context.id)
        return response

    return routes


def embedding_list(context: RequestContext, body: EmbeddingBody, result: EmbeddingResult) -> dict[str, Any]:
    """The ``list`` object of the vectors."""
    write = _base64 if body.encoding_format == "base64" else _numbers
    return {
        "id": context.id,
        "object": "list",
        "created": context.created,
        "model": context.model,
        "data": [{"object": "embedding", "index": index, "embedding": write(vector)} for index, vector in enumerate(result.vectors)],
        "usage": {"prompt_tokens": result.usage.prompt_tokens, "total_tokens": result.usage.total_tokens},
    }


def _base64(vector: bytes) -> str:
    """float32, little-endian, as OpenAI's libraries read it."""
    return base64.b64encode(vector).decode()


def _numbers(vector: bytes) -> list[float]:
    numbers: list[float] = np.frombuffer(vector, "<f4").tolist()
    return numbers
