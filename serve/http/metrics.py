"""GET /metrics, for Prometheus."""

from collections.abc import Awaitable, Callable

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

MetricsPage = Callable[[str], Awaitable[tuple[bytes, str]]]
"""From an Accept header to the page in that format, and its Content-Type."""


def metrics_routes(page: MetricsPage) -> APIRouter:
    routes = APIRouter()

    @routes.head("/metrics", include_in_schema=False)
    @routes.get("/metrics")
    async def metrics(request: Request) -> Response:
        body, content_type = await page(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    return routes
