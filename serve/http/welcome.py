"""GET /: a page for people who open the server's address in a browser or with curl."""

from collections.abc import Mapping

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from serve.http.context import HttpApi
from serve.version import version


def welcome_routes(api: HttpApi) -> APIRouter:
    routes = APIRouter()

    @routes.head("/", include_in_schema=False)
    @routes.get("/", include_in_schema=False)
    async def welcome() -> Response:
        return PlainTextResponse(page(api.service().readiness()))

    return routes


def page(readiness: Mapping[str, bool]) -> str:
    """``readiness``: whether each model is ready, by name."""
    models = "\n".join(f"  {name}{'' if ready else ' (not ready)'}" for name, ready in readiness.items())
    return f"""Manta {version()} serves
{models}

  /v1             OpenAI's API: the base_url of clients is this address with /v1 behind it
  /openapi.json   every path and field
  /health         whether the models answer
  /metrics        for Prometheus
"""
