"""/: what somebody reads who opens the server's address in a browser, or asks it with curl, to see whether it is there."""

from collections.abc import Mapping

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from serve.http.context import Front
from serve.version import version


def welcome_routes(front: Front) -> APIRouter:
    routes = APIRouter()

    @routes.head("/", include_in_schema=False)
    @routes.get("/", include_in_schema=False)
    async def welcome() -> Response:
        return PlainTextResponse(page(front.service().readiness()))

    return routes


def page(readiness: Mapping[str, bool]) -> str:
    """``readiness``: of each model, by its name."""
    models = "\n".join(f"  {name}{'' if ready else ' (not ready)'}" for name, ready in readiness.items())
    return f"""Manta {version()} serves
{models}

  /v1             OpenAI's API: the base_url of clients is this address with /v1 behind it
  /openapi.json   every path and field
  /health         whether the models answer
  /metrics        for Prometheus
"""
