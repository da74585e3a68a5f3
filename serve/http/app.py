"""The HTTP front as one ASGI app."""

from collections.abc import Callable, Mapping, Sequence

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from serve.auth import OpenDoor
from serve.bypass import Ways
from serve.caller import Caller
from serve.errors import MethodNotAllowed, RouteNotFound, ServeError, clipped
from serve.http.auth import Admits, Authorise
from serve.http.boundary import RequestBoundary
from serve.http.bypass import FrontBypass
from serve.http.chat import chat_routes
from serve.http.completions import completion_routes
from serve.http.context import Front
from serve.http.embeddings import embedding_routes
from serve.http.errors import error_response
from serve.http.health import health_routes
from serve.http.metrics import MetricsPage, metrics_routes
from serve.http.models import model_routes
from serve.http.openapi import describe_api
from serve.http.responses.routes import response_routes
from serve.http.tokens import token_routes
from serve.http.welcome import welcome_routes
from serve.limits import Limits
from serve.service_api import Offers
from serve.version import version


def create_app(
    service: Callable[[], Offers],
    limits: Limits | None = None,
    *,
    metrics: MetricsPage | None = None,
    door: Callable[[], Admits] = OpenDoor,
    quota_headers: Callable[[Caller], Mapping[str, str]] = lambda caller: {},
    strict: bool = False,
    allowed_origins: Sequence[str] = (),
    behind_ray: bool = False,
    ways: Ways | None = None,
) -> FastAPI:
    """The app. ``service`` and ``door`` are asked at each request, so they may be made later, in the process that serves.

    ``behind_ray``: Ray Serve's proxy stands before it, gives every request its id and tells it to the client.
    ``ways``: by which pieces of streams may pass to a proxy of this host (`serve.bypass`).
    """
    front = Front(service=service, limits=limits or Limits(), strict=strict)
    app = FastAPI(title="Manta", version=version(), docs_url=None, redoc_url=None, redirect_slashes=False)
    apis = (chat_routes, completion_routes, embedding_routes, response_routes, model_routes, token_routes)
    for routes in (*apis, health_routes, welcome_routes):
        app.include_router(routes(front))
    if metrics is not None:
        app.include_router(metrics_routes(metrics))
    app.add_exception_handler(HTTPException, _no_such_route)
    app.add_middleware(Authorise, door=door, quota_headers=quota_headers)
    app.add_middleware(RequestBoundary, limits=front.limits, behind_ray=behind_ray)
    if allowed_origins:  # outside of the two: browsers ask without a key first, and scripts may read refusals too
        app.add_middleware(CORSMiddleware, allow_origins=allowed_origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["*"])
    if ways is not None:
        app.add_middleware(FrontBypass, ways=ways)
    describe_api(app)
    return app


async def _no_such_route(request: Request, error: Exception) -> Response:
    """Routing is the only one to raise this; its Allow header is kept."""
    assert isinstance(error, HTTPException)
    method, path = clipped(request.method, 16), clipped(request.scope["path"], 64)
    if error.status_code == 405:
        taken = Headers(error.headers).get("allow", "other methods")
        refusal: ServeError = MethodNotAllowed(f"{path} does not take {method}, but {taken}")
    else:
        refusal = RouteNotFound(f"there is no path {path!r} here; OpenAI's API is below /v1 once, and /openapi.json has every path")
    return error_response(refusal, headers=dict(error.headers or {}))
