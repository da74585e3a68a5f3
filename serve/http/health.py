"""GET /livez, /readyz, /health: for probes and load balancers."""

from fastapi import APIRouter
from starlette.responses import Response

from serve.errors import ModelNotFound, NotReady
from serve.http.context import HttpApi
from serve.http.errors import json_response


def health_routes(api: HttpApi) -> APIRouter:
    routes = APIRouter()

    @routes.head("/livez", include_in_schema=False)
    @routes.get("/livez")
    async def livez() -> Response:
        """Whether this process answers. Says nothing about the model: restarting a front does not help a replica."""
        return json_response({"status": "alive"})

    @routes.head("/readyz", include_in_schema=False)
    @routes.get("/readyz")
    @routes.head("/health", include_in_schema=False)
    @routes.get("/health")
    async def readyz(model: str | None = None) -> Response:
        """Whether a request sent now would be computed: for any model, or for the one named by ``?model=``. Lists every model."""
        readiness = api.service().readiness()
        if model is not None and model not in readiness:
            raise ModelNotFound(model, list(readiness))
        if not (api.service().ready() if model is None else readiness[model]):
            raise NotReady("no replica of any model is ready" if model is None else "no replica of this model is ready")
        return json_response({"status": "ready", "models": {name: "ready" if ready else "not ready" for name, ready in readiness.items()}})

    return routes
