"""`python -m server`: read the configuration, bind the port, serve until told to stop."""

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
from collections.abc import Iterator

import structlog
import uvicorn

from server.app import create_app
from server.config import ServerConfig, load_config
from server.config_errors import ConfigError
from server.gpus import count_gpus
from server.logs import configure_logging
from server.metrics_compat import make_metrics
from server.pool import Launch, WorkerPool
from server.protocol import http_config
from server.routes.probes import create_metrics_app
from server.supervisor import WorkerProcess

EXIT_FAILED = 1
EXIT_USAGE = 2

log = structlog.get_logger("server")


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers, whose exit status is not 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """One run of the server: HTTP, the pool, and what ends them."""

    def __init__(
        self,
        config: ServerConfig,
        listener: socket.socket,
        launch: Launch,
        metrics_listener: socket.socket | None = None,
    ) -> None:
        app = create_app(config, WorkerPool(config, make_metrics(config), launch))
        self._config = config
        self._listener = listener
        self._pool: WorkerPool = app.state.pool
        self._http = HttpServer(
            http_config(
                app,
                app.state.limits,
                app.state.request_log.record_unread,
                root_path=config.root_path,
                ssl_certfile=config.ssl_certfile,
                ssl_keyfile=config.ssl_keyfile,
            )
        )
        self._served = [(self._http, listener)]
        if metrics_listener is not None:
            settings = http_config(
                create_metrics_app(self._pool), app.state.limits, app.state.request_log.record_unread
            )
            self._served.append((HttpServer(settings), metrics_listener))
        self._exit_code = 0
        self._draining: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Serve until a signal or a fatal event; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        watchers = [loop.create_task(self._announce()), loop.create_task(self._watch_fatal())]
        await asyncio.gather(*(http.serve(sockets=[listener]) for http, listener in self._served))
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
        return self._exit_code

    def _on_signal(self) -> None:
        """The first signal drains, the second ends at once."""
        if self._draining is None:
            log.info("draining", timeout_seconds=self._config.shutdown_timeout)
            self._draining = asyncio.get_running_loop().create_task(self._drain())
            return
        self._pool.kill()
        os._exit(EXIT_FAILED)

    async def _drain(self) -> None:
        await self._pool.drain(self._config.shutdown_timeout)
        self._stop_serving()

    def _stop_serving(self) -> None:
        for http, _ in self._served:
            http.should_exit = True

    async def _announce(self) -> None:
        model = await self._pool.wait_ready()
        # What is there now stays: walking over it held up the event loop for 50 ms at a time.
        gc.collect()
        gc.freeze()
        host, port = self._listener.getsockname()[:2]
        scheme = "http" if self._config.ssl_certfile is None else "https"
        log.info(
            "ready",
            url=f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{self._config.root_path}",
            model=self._config.target_id,
            draft=self._config.draft_id,
            method=self._config.decoding.method,
            device=model.device,
            memory_mib=model.memory_bytes // 2**20,
            energy_source=model.energy_source,
            load_seconds=round(model.load_seconds, 2),
            description=model.description,
        )

    async def _watch_fatal(self) -> None:
        """A pair that cannot be served ends the server, with one line."""
        event = await self._pool.wait_fatal()
        sys.stderr.write(f"error: {event.message}\n")
        self._exit_code = event.exit_code
        self._stop_serving()


def bind(host: str, port: int, flag: str) -> socket.socket:
    """The listening socket, before any model is loaded; raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        raise ConfigError(
            f"{flag} {port} on --host {host} cannot be used ({reason}): "
            "stop what listens there or choose another"
        ) from error
    listener.setblocking(False)
    return listener


def with_workers(config: ServerConfig) -> ServerConfig:
    """Unless it says otherwise, as many workers as there are GPUs for; on a CPU one, with all its cores.

    Raises ConfigError where there are GPUs, but fewer than the workers of this machine need.
    """
    is_told = "num_workers" in config.model_fields_set
    needed = config.num_workers * config.tensor_parallel_size
    if config.device == "cpu" or (is_told and (needed == 1 or config.worker_backend != "local")):
        return config
    visible = count_gpus()
    if not is_told:
        config = config.model_copy(update={"num_workers": max(1, visible // config.tensor_parallel_size)})
        needed = config.num_workers * config.tensor_parallel_size
    if needed > visible > 0 and config.worker_backend == "local":
        raise ConfigError(
            f"--num-workers {config.num_workers} with --tensor-parallel-size {config.tensor_parallel_size} "
            f"needs {needed} GPUs, of which {visible} can be seen; give smaller numbers, name more GPUs in "
            "CUDA_VISIBLE_DEVICES, or hide all with --device cpu"
        )
    return config


def main(launch: Launch = WorkerProcess) -> int:
    """`launch` starts a worker; tests give one that fails on order."""
    try:
        config = with_workers(load_config())
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USAGE
    configure_logging(sys.stdout)
    metrics_listener = None
    try:
        listener = bind(config.host, config.port, "--port")
        if config.metrics_port is not None:
            metrics_listener = bind(config.host, config.metrics_port, "--metrics-port")
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_FAILED
    return asyncio.run(Server(config, listener, launch, metrics_listener).run())


if __name__ == "__main__":
    raise SystemExit(main())
