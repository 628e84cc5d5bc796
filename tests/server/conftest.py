"""An application over a scripted worker, reached through httpx without a port."""

import io
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.app import create_app
from server.config import ServerConfig
from server.logs import configure_logging
from server.messages import Event, LoadCommand
from server.metrics import Metrics
from server.pool import WorkerPool
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

    async def complete(self, **fields: Any) -> httpx.Response:
        body = {"model": "tiny", "prompt": "x", "temperature": 0, **fields}
        return await self.client.post("/v1/completions", json=body)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.pool.metrics.registry.get_sample_value(name, labels)


Serve = Callable[..., AbstractAsyncContextManager[Served]]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """`async with serve(engine, has_draft=..., ready=..., **config) as served`."""

    @asynccontextmanager
    async def start(
        engine: ScriptedEngine | None = None, *, has_draft: bool = True, ready: bool = True, **settings: Any
    ) -> AsyncIterator[Served]:
        engine = engine or ScriptedEngine()
        event = ready_event(save_tokenizer(tmp_path), has_draft=has_draft)
        speculative = {"model": "tiny-draft"} if has_draft else {}
        config = ServerConfig(**{"model": "tiny", "speculative_config": speculative, **settings})
        workers: list[ThreadWorker] = []

        def launch(load: LoadCommand, on_event: Callable[[Event], None], on_lost: Callable[[], None]) -> Any:
            worker = ThreadWorker(load, on_event, on_lost, engine=engine, ready=event if ready else None)
            workers.append(worker)
            return worker

        pool = WorkerPool(config, Metrics("test"), launch)
        app = create_app(config, pool)
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            if ready:
                await until(lambda: pool.refusal is None)
            yield Served(app, client, pool, engine, workers[0])

    return start


@pytest.fixture
async def served(serve: Serve) -> AsyncIterator[Served]:
    async with serve() as running:
        yield running
