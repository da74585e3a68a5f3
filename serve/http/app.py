"""The HTTP API: an ASGI app with all routes and middleware."""

from collections.abc import Callable, Mapping, Sequence

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from serve.auth import Authenticator, NoAuthentication
from serve.bypass import FrontEndpoint
from serve.caller import Caller
from serve.errors import MethodNotAllowed, RouteNotFound, ServeError, truncate
from serve.http.auth import AuthMiddleware
from serve.http.boundary import RequestBoundary
from serve.http.bypass import FrontBypass
from serve.http.chat import chat_routes
from serve.http.completions import completion_routes
from serve.http.context import HttpApi
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
from serve.service_api import ServiceApi
from serve.version import version


def create_app(
    service: Callable[[], ServiceApi],
    limits: Limits | None = None,
    *,
    metrics: MetricsPage | None = None,
    authenticator: Callable[[], Authenticator] = NoAuthentication,
    quota_headers: Callable[[Caller], Mapping[str, str]] = lambda caller: {},
    strict: bool = False,
    allowed_origins: Sequence[str] = (),
    behind_ray: bool = False,
    disconnect_errors: tuple[type[Exception], ...] = (),
    bypass: FrontEndpoint | None = None,
    on_error: Callable[[BaseException], None] = lambda error: None,
) -> FastAPI:
    """Make the app.

    Args:
        service, authenticator: called for each request, so they may be made later, in the process that serves.
        limits: None: the defaults.
        metrics: the page of /metrics; None: there is no such path.
        quota_headers: response headers about the quotas of a caller.
        strict: refuse fields that have no effect.
        allowed_origins: for browsers (CORS); empty: none.
        behind_ray: Ray Serve's proxy is in front, gives every request its id and sends it to the client.
        disconnect_errors: what ASGI's ``receive`` raises, instead of returning a disconnect, when the client is gone.
        bypass: sends chunks of streams to a proxy of this host (`serve.bypass`); None: all through Ray.
        on_error: told of each error that a request is answered with before its response has started.
    """
    api = HttpApi(service=service, limits=limits or Limits(), strict=strict)
    app = FastAPI(title="Manta", version=version(), docs_url=None, redoc_url=None, redirect_slashes=False)
    apis = (chat_routes, completion_routes, embedding_routes, response_routes, model_routes, token_routes)
    for routes in (*apis, health_routes, welcome_routes):
        app.include_router(routes(api))
    if metrics is not None:
        app.include_router(metrics_routes(metrics))

    async def no_such_route(request: Request, error: Exception) -> Response:
        """Only routing raises this. Its Allow header is kept."""
        assert isinstance(error, HTTPException)
        refusal = _no_such_route(request, error)
        on_error(refusal)
        return error_response(refusal, headers=dict(error.headers or {}))

    app.add_exception_handler(HTTPException, no_such_route)
    app.add_middleware(AuthMiddleware, authenticator=authenticator, quota_headers=quota_headers)
    app.add_middleware(RequestBoundary, limits=api.limits, behind_ray=behind_ray, disconnect_errors=disconnect_errors, on_error=on_error)
    if allowed_origins:  # outermost: preflight requests have no key, and scripts may read error responses
        app.add_middleware(CORSMiddleware, allow_origins=allowed_origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["*"])
    if bypass is not None:
        app.add_middleware(FrontBypass, bypass=bypass)
    describe_api(app)
    return app


def _no_such_route(request: Request, error: HTTPException) -> ServeError:
    method, path = truncate(request.method, 16), truncate(request.scope["path"], 64)
    if error.status_code == 405:
        allowed = Headers(error.headers).get("allow", "other methods")
        return MethodNotAllowed(f"{path} does not take {method}, but {allowed}")
    return RouteNotFound(f"there is no path {path!r} here; OpenAI's API is below /v1 once, and /openapi.json has every path")
