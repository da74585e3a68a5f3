"""/livez, /readyz, /health: for probes and load balancers."""

from fastapi import APIRouter
from starlette.responses import Response

from serve.errors import NotReady
from serve.http.context import Front
from serve.http.errors import json_response


def health_routes(front: Front) -> APIRouter:
    routes = APIRouter()

    @routes.head("/livez", include_in_schema=False)
    @routes.get("/livez")
    async def livez() -> Response:
        """This process answers. It says nothing about the model: restarting a front does not help a replica."""
        return json_response({"status": "alive"})

    @routes.head("/readyz", include_in_schema=False)
    @routes.get("/readyz")
    @routes.head("/health", include_in_schema=False)
    @routes.get("/health")
    async def readyz() -> Response:
        """A request sent now would be computed."""
        if not front.service().ready():
            raise NotReady("no replica of the model is ready")
        return json_response({"status": "ready"})

    return routes
