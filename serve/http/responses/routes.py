"""Places 1 and 14 of a request over HTTP: POST /v1/responses."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from engine.request_trace import trace_place
from serve.errors import RouteNotFound
from serve.hold_header import hold_headers
from serve.http.context import HttpApi
from serve.http.disconnect import cancel_on_disconnect
from serve.http.errors import json_response
from serve.http.openapi import json_body
from serve.http.responses.error_fields import translate_errors
from serve.http.responses.events import ResponsesStreamFormat
from serve.http.responses.schema import ResponsesBody
from serve.http.sse import open_stream

ID_PREFIX = "resp_"
NOT_FOUND = "responses are not stored here: each is sent once, to the request that asked for it"
NOT_OFFERED = {
    "compact": "conversations are not compacted here; leave out of the input what the model need not read",
    "input_tokens": "the tokens of an input are not counted here; POST /tokenize counts those of messages",
}
"""OpenAI's other endpoints below this path, beside those for stored responses."""


def response_routes(api: HttpApi) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/responses", openapi_extra=json_body(ResponsesBody))
    async def create_response(request: Request) -> Response:
        body, context, headers = await api.receive(request, ResponsesBody, id_prefix=ID_PREFIX)
        service, conversation = api.service(), body.conversation()
        chat = context.apply_to(body.request(context.id, conversation.messages))
        stream_format = ResponsesStreamFormat(context, body, service.model(body.model).defaults)
        response: Response
        with translate_errors(body, conversation):
            if body.stream:
                response = await open_stream(
                    request.receive, service.chat(chat), stream_format, headers, include_timing=context.wants_timing
                )
            else:
                result = await cancel_on_disconnect(request.receive, service.collect(chat))
                headers |= hold_headers(result.held_s) | context.timing_headers(result.timing)
                response = json_response(stream_format.whole(result), headers=headers)
        trace_place(14, context.id)
        return response

    @routes.api_route("/v1/responses/{rest:path}", methods=["GET", "POST", "DELETE"], include_in_schema=False)
    async def not_stored(rest: str) -> Response:
        raise RouteNotFound(NOT_OFFERED.get(rest, NOT_FOUND))

    return routes
