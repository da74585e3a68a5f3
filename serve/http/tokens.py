"""/tokenize, /detokenize, /tokenizer_info, /version: for tools that count tokens or evaluate models. The shapes are vLLM's."""

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BeforeValidator, FailFast, Field
from starlette.requests import Request
from starlette.responses import Response

from serve.errors import InvalidRequest
from serve.http.body import read_json_object
from serve.http.context import HttpApi
from serve.http.errors import json_response
from serve.http.field_parsers import empty_if_none
from serve.http.openapi import json_body
from serve.http.schema import Body, MessageBody, validate
from serve.request import TokenizeRequest
from serve.version import version


class TokenizeBody(Body):
    """Body of /tokenize: either a prompt, as in a completion, or messages, as in a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[MessageBody], FailFast(), BeforeValidator(empty_if_none)] = Field(default_factory=list)
    add_special_tokens: bool = True
    return_token_strs: bool | None = None

    def request(self, model: str) -> TokenizeRequest:
        if (self.prompt is None) == (not self.messages):
            raise InvalidRequest("send a prompt or messages, one of the two", param="prompt")
        text = tuple(message.message(at) for at, message in enumerate(self.messages)) if self.prompt is None else self.prompt
        return TokenizeRequest(model=model, input=text, add_special_tokens=self.add_special_tokens)


class DetokenizeBody(Body):
    """Body of /detokenize."""

    model: str | None = None
    tokens: Annotated[list[int], FailFast()]


def token_routes(api: HttpApi) -> APIRouter:
    routes = APIRouter()

    def model_of(name: str | None) -> str:
        """Tools made for servers with one model do not name it."""
        return api.service().models()[0].name if name is None else name

    @routes.post("/tokenize", openapi_extra=json_body(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        body = validate(TokenizeBody, await read_json_object(request, api.limits), api.limits)
        service, model = api.service(), model_of(body.model)
        ids = await service.tokenize(body.request(model))
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": service.model(model).max_context_tokens, "tokens": ids}
        if body.return_token_strs:
            answer["token_strs"] = await service.token_texts(model, ids)
        return json_response(answer)

    @routes.post("/detokenize", openapi_extra=json_body(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        body = validate(DetokenizeBody, await read_json_object(request, api.limits), api.limits)
        return json_response({"prompt": await api.service().detokenize(model_of(body.model), tuple(body.tokens))})

    @routes.head("/tokenizer_info", include_in_schema=False)
    @routes.get("/tokenizer_info")
    async def tokenizer_info(model: str | None = None) -> Response:
        return json_response(api.service().model(model_of(model)).tokenizer_info)

    @routes.head("/version", include_in_schema=False)
    @routes.get("/version")
    async def get_version() -> Response:
        return json_response({"version": version()})

    return routes
