"""Steps 1 and 14 of a request, over HTTP: /v1/responses."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from engine.request_trace import trace_place
from serve.errors import RouteNotFound
from serve.hold_header import held_headers
from serve.http.context import Front
from serve.http.disconnect import unless_gone
from serve.http.errors import json_response
from serve.http.openapi import takes
from serve.http.responses.error_fields import spelled_for
from serve.http.responses.events import ResponseEvents
from serve.http.responses.schema import ResponsesBody
from serve.http.sse import open_stream

ID_PREFIX = "resp_"
ELSEWHERE = {
    "compact": "conversations are not taken together here; leave out of the input what the model need not read",
    "input_tokens": "tokens of an input are not counted here before it is answered; /tokenize counts those of messages",
}
"""What OpenAI has below this path beside stored responses."""


def response_routes(front: Front) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/responses", openapi_extra=takes(ResponsesBody))
    async def create_response(request: Request) -> Response:
        body, stamp, headers = await front.receive(request, ResponsesBody, id_prefix=ID_PREFIX)
        service, conversation = front.service(), body.conversation()
        asked = stamp.sign(body.request(stamp.id, conversation.messages))
        writer = ResponseEvents(stamp, body, service.model(body.model).defaults)
        with spelled_for(body, conversation):
            if body.stream:
                answer: Response = await open_stream(request.receive, service.chat(asked), writer, headers, tell_ledger=stamp.wants_ledger)
            else:
                result = await unless_gone(request.receive, service.collect(asked))
                headers |= held_headers(result.held_s) | stamp.timing(result.ledger)
                answer = json_response(writer.whole(result), headers=headers)
        trace_place(14, stamp.id)
        return answer

    @routes.api_route("/v1/responses/{rest:path}", methods=["GET", "POST", "DELETE"], include_in_schema=False)
    async def nothing_is_stored(rest: str) -> Response:
        raise RouteNotFound(ELSEWHERE.get(rest, "no response is stored here: an answer is told once, to the request that asked for it"))

    return routes
