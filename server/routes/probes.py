"""Probes and scrapes; none of them touches the engine."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server import __version__
from server.errors import OverloadedError
from server.metrics import CONTENT_TYPE
from server.pool import WorkerPool

router = APIRouter(tags=["probes"])


@router.get("/health")
async def health() -> dict[str, Any]:
    """This process is alive."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> dict[str, Any]:
    """A worker can take requests; else 503 with the reason as code."""
    pool: WorkerPool = request.app.state.pool
    if pool.refusal is not None:
        raise OverloadedError(pool.refusal)
    return {"status": "ready"}


@router.get("/version")
async def version() -> dict[str, Any]:
    return {"version": __version__}


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    pool: WorkerPool = request.app.state.pool
    return Response(pool.metrics.exposition(), media_type=CONTENT_TYPE)
