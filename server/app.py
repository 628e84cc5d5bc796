"""The ASGI application: routes, error handlers, and the pool's life."""

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from server import __version__
from server.auth import KeyMiddleware
from server.config import ServerConfig
from server.errors import (
    ApiError,
    ClientGoneError,
    handle_api_error,
    handle_client_gone,
    handle_http_exception,
)
from server.limits import HttpLimits
from server.loop_lag import measured_lag
from server.metrics_compat import make_metrics
from server.middleware import RequestMiddleware
from server.openapi import document
from server.pool import WorkerPool
from server.rate_limit import RateLimitMiddleware
from server.report import system_fingerprint
from server.request_log import RequestLog
from server.routes import chat, completions, models, playground, probes, tokens


def create_app(
    config: ServerConfig, pool: WorkerPool | None = None, limits: HttpLimits | None = None
) -> FastAPI:
    """The application; by default a pool is made, which lives as long as the app."""
    if pool is None:
        pool = WorkerPool(config, make_metrics(config))
    app = FastAPI(
        title="MMTAD server",
        version=__version__,
        lifespan=_lifespan,
        redirect_slashes=False,
        openapi_url=None if config.disable_fastapi_docs else "/openapi.json",
    )
    app.state.config = config
    app.state.pool = pool
    app.state.limits = limits or HttpLimits()
    app.state.request_log = RequestLog(pool.metrics)
    app.state.fingerprint = system_fingerprint(config)
    for routes in (completions, chat, models, tokens, probes, playground):
        app.include_router(routes.router)
    if config.metrics_port is None:
        app.include_router(probes.metrics_router)
    app.add_exception_handler(ApiError, handle_api_error)
    app.add_exception_handler(HTTPException, handle_http_exception)
    app.add_exception_handler(ClientGoneError, handle_client_gone)
    app.add_exception_handler(ClientDisconnect, handle_client_gone)
    _add_middleware(app, config)
    document(app, config)
    return app


def _add_middleware(app: FastAPI, config: ServerConfig) -> None:
    """From the inside out: rates, keys, the headers that browsers ask for, ids and counts."""
    if config.requests_per_minute is not None:
        app.add_middleware(RateLimitMiddleware, per_minute=config.requests_per_minute)
    if config.key_digests:
        app.add_middleware(KeyMiddleware, digests=config.key_digests)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(RequestMiddleware, request_log=app.state.request_log, limits=app.state.limits)


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    pool: WorkerPool = app.state.pool
    pool.start()
    try:
        async with measured_lag(pool.metrics.loop_lag_seconds.observe):
            yield
    finally:
        await pool.stop()
