"""Steps 1 and 14 of a request for embeddings, over HTTP: /v1/embeddings."""

import base64
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter
from pydantic import BeforeValidator, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from engine.request_trace import trace_place
from serve.hold_header import held_headers
from serve.http.context import Front, Stamp
from serve.http.disconnect import unless_gone
from serve.http.errors import json_response
from serve.http.field_parsers import prompt_list
from serve.http.openapi import takes
from serve.http.schema import PROMPTS, NamedBody
from serve.request import EmbeddingRequest, EmbeddingResult


class EmbeddingBody(NamedBody):
    """Body of /v1/embeddings."""

    input: Annotated[list[str | list[int]], BeforeValidator(prompt_list), WithJsonSchema(PROMPTS)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None

    def request(self, request_id: str) -> EmbeddingRequest:
        inputs = tuple(one if isinstance(one, str) else tuple(one) for one in self.input)
        return EmbeddingRequest(request_id=request_id, model=self.model, inputs=inputs, dimensions=self.dimensions)


def embedding_routes(front: Front) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/embeddings", openapi_extra=takes(EmbeddingBody))
    async def create_embedding(request: Request) -> Response:
        body, stamp, headers = await front.receive(request, EmbeddingBody, id_prefix="embd-")
        result = await unless_gone(request.receive, front.service().embed(stamp.sign(body.request(stamp.id))))
        answer = json_response(embeddings(stamp, body, result), headers=headers | held_headers(result.held_s))
        trace_place(14, stamp.id)
        return answer

    return routes


def embeddings(stamp: Stamp, body: EmbeddingBody, result: EmbeddingResult) -> dict[str, Any]:
    written = _base64 if body.encoding_format == "base64" else _numbers
    return {
        "id": stamp.id,
        "object": "list",
        "created": stamp.created,
        "model": stamp.model,
        "data": [{"object": "embedding", "index": index, "embedding": written(vector)} for index, vector in enumerate(result.vectors)],
        "usage": {"prompt_tokens": result.usage.prompt_tokens, "total_tokens": result.usage.total_tokens},
    }


def _base64(vector: bytes) -> str:
    """float32, little-endian, as OpenAI's libraries read it."""
    return base64.b64encode(vector).decode()


def _numbers(vector: bytes) -> list[float]:
    numbers: list[float] = np.frombuffer(vector, "<f4").tolist()
    return numbers
