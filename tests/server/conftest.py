"""An application over a scripted worker, reached through httpx without a port, or through a real one."""

import asyncio
import io
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.__main__ import HttpServer
from server.app import create_app
from server.config import ServerConfig
from server.limits import HttpLimits
from server.logs import configure_logging
from server.messages import Event, LoadCommand
from server.metrics import Metrics
from server.pool import WorkerPool
from server.protocol import http_config
from tests.server.fakes import ScriptedEngine, ThreadWorker, ready_event, save_tokenizer, until


@pytest.fixture(autouse=True)
def logs() -> io.StringIO:
    """What the server logs, as in production: never rendered with the values of variables."""
    stream = io.StringIO()
    configure_logging(stream)
    return stream


@dataclass
class Served:
    """One running application with handles on what is inside."""

    app: FastAPI
    client: httpx.AsyncClient
    pool: WorkerPool
    engine: ScriptedEngine
    worker: ThreadWorker
    port: int | None = None

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection of its own to the port."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def complete(self, **fields: Any) -> httpx.Response:
        body = {"model": "tiny", "prompt": "x", "temperature": 0, **fields}
        return await self.client.post("/v1/completions", json=body)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.pool.metrics.registry.get_sample_value(name, labels)


Serve = Callable[..., AbstractAsyncContextManager[Served]]


@dataclass
class Made:
    """An application that nobody serves yet, and what is inside."""

    app: FastAPI
    pool: WorkerPool
    engine: ScriptedEngine
    workers: list[ThreadWorker]


Make = Callable[..., Made]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def build(
        engine: ScriptedEngine | None = None,
        *,
        has_draft: bool = True,
        ready: bool = True,
        limits: HttpLimits | None = None,
        **settings: Any,
    ) -> Made:
        engine = engine or ScriptedEngine()
        event = ready_event(save_tokenizer(tmp_path), has_draft=has_draft, context=engine.context)
        speculative = {"model": "tiny-draft"} if has_draft else {}
        config = ServerConfig(**{"model": "tiny", "speculative_config": speculative, **settings})
        workers: list[ThreadWorker] = []

        def launch(load: LoadCommand, on_event: Callable[[Event], None], on_lost: Callable[[], None]) -> Any:
            worker = ThreadWorker(load, on_event, on_lost, engine=engine, ready=event if ready else None)
            workers.append(worker)
            return worker

        pool = WorkerPool(config, Metrics("test"), launch)
        return Made(create_app(config, pool, limits), pool, engine, workers)

    return build


@pytest.fixture
def serve(make: Make) -> Serve:
    """`async with serve(engine, has_draft=..., ready=..., limits=..., **config) as served`."""

    @asynccontextmanager
    async def start(
        engine: ScriptedEngine | None = None, *, ready: bool = True, **settings: Any
    ) -> AsyncIterator[Served]:
        made = make(engine, ready=ready, **settings)
        transport = httpx.ASGITransport(app=made.app)
        async with (
            made.app.router.lifespan_context(made.app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            if ready:
                await until(lambda: made.pool.refusal is None)
            yield Served(made.app, client, made.pool, made.engine, made.workers[0])

    return start


@pytest.fixture
def serve_port(make: Make) -> Serve:
    """As `serve`, with uvicorn as the server runs it: `served.port` and `served.connect()`."""

    @asynccontextmanager
    async def start(engine: ScriptedEngine | None = None, **settings: Any) -> AsyncIterator[Served]:
        made = make(engine, **settings)
        state = made.app.state
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        config = http_config(
            made.app, state.limits, state.request_log.record_unread, root_path=state.config.root_path
        )
        server = HttpServer(config)
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        try:
            await until(lambda: server.started and made.pool.refusal is None)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                yield Served(made.app, client, made.pool, made.engine, made.workers[0], port)
        finally:
            server.should_exit = True
            await serving

    return start


@pytest.fixture
async def served(serve: Serve) -> AsyncIterator[Served]:
    async with serve() as running:
        yield running
