"""How many streams and tokens per second the API process sustains on one core, with workers without models.

    python -m benchmarks.api_process --streams 64 128 256 --step-seconds 0.05 --tokens 3 --seconds 12

Each row serves that many streams at once from workers that deliver tokens at a fixed pace (see
`benchmarks.paced_worker`). The API process has one core to itself, workers and clients share another one.
Prints one JSON object a row: offered and delivered tokens per second, chunks per second, percentiles of the
event loop's lag while all streams run (each the upper bound of its bucket), and the CPU time of the API
process per chunk.
`--profile FILE` has py-spy record what the API process does, of the last row in the end.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil

from benchmarks.load.processes import free_port, started
from benchmarks.loop_lag import Buckets, buckets_between, lag_buckets, percentile
from server import __main__ as entry
from server.supervisor import WorkerProcess

END = b"data: [DONE]"
CHUNK = b"data: {"
START_SECONDS = 60.0
READ_BYTES = 256 * 1024


class Clients:
    """Streams over plain sockets, read as cheaply as Python can, on one thread."""

    def __init__(self, port: int, num_streams: int, max_tokens: int) -> None:
        body = json.dumps(
            {
                "model": "paced",
                "prompt": "SELECT",
                "max_tokens": max_tokens,
                "stream": True,
                "ignore_eos": True,
            }
        ).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        self._request = head.encode() + b"Content-Type: application/json\r\n\r\n" + body
        self._port = port
        self._num_streams = num_streams
        self.num_chunks = 0
        self.num_failed = 0

    def run(self, on_begun: Callable[[], None], on_ending: Callable[[], None]) -> float:
        """Seconds from the first chunk to the end of the last stream.

        Calls back once all have begun, and again when the first one has ended.
        """
        selector = selectors.DefaultSelector()
        tails: dict[socket.socket, bytes] = {}
        for _ in range(self._num_streams):
            link = socket.create_connection(("127.0.0.1", self._port))
            link.sendall(self._request)
            selector.register(link, selectors.EVENT_READ, link)
            tails[link] = b""
        silent, started = set(tails), 0.0
        while tails:
            for key, _ in selector.select():
                link = key.data
                received = link.recv(READ_BYTES)
                data = tails[link] + received
                self.num_chunks += data.count(CHUNK)
                if CHUNK in data and link in silent:
                    started = started or time.monotonic()
                    silent.remove(link)
                    if not silent:
                        on_begun()
                if not received or END in data:
                    if len(tails) == self._num_streams:
                        on_ending()
                    self.num_failed += not received
                    selector.unregister(link)
                    link.close()
                    del tails[link]
                else:
                    tails[link] = b"" if data.endswith(b"}\n\n") else data[1 - len(END) :].replace(CHUNK, b"")
        return time.monotonic() - started


@contextlib.contextmanager
def serving(arguments: argparse.Namespace, rows: int) -> Iterator[tuple[psutil.Process, int]]:
    """The API process with its paced workers, and its port, once all of them are ready."""
    port = free_port()
    api_core, load_core = arguments.cores
    pace = [str(arguments.step_seconds), str(arguments.tokens), str(load_core)]
    flags = ["--port", str(port), "--served-model-name", "paced", "--num-workers", str(arguments.workers)]
    command = [sys.executable, "-m", "benchmarks.api_process", "--serve", str(api_core), *pace]
    command += [*flags, "--max-num-seqs", str(rows), "--device", "cpu", "--energy-source", "none"]
    with started(command, f"http://127.0.0.1:{port}", seconds=START_SECONDS) as process:
        asyncio.run(_ready(port, arguments.workers))
        yield process, port


async def _ready(port: int, num_workers: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                lines = (await client.get("/metrics")).text.splitlines()
                up = [line for line in lines if line.startswith("mmtad_worker_up{") and line.endswith(" 1.0")]
                if len(up) == num_workers:
                    return
            await asyncio.sleep(0.2)
    raise TimeoutError("the API process did not become ready")


async def _lag(port: int) -> Buckets:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        return await lag_buckets(client)


def measure(arguments: argparse.Namespace, num_streams: int) -> dict[str, Any]:
    rows = -(-num_streams // arguments.workers)
    steps = round(arguments.seconds / arguments.step_seconds)
    max_tokens = steps * arguments.tokens
    with serving(arguments, rows) as (api, port):
        before: Buckets = {}
        after: Buckets = {}
        clients = Clients(port, num_streams, max_tokens)
        cpu = sum(api.cpu_times()[:2])
        with _profiled(arguments, api.pid):
            seconds = clients.run(
                lambda: before.update(asyncio.run(_lag(port))), lambda: after.update(asyncio.run(_lag(port)))
            )
            cpu = sum(api.cpu_times()[:2]) - cpu
    during = buckets_between(before, after)
    return {
        "streams": num_streams,
        "offered_tokens_per_second": round(num_streams * arguments.tokens / arguments.step_seconds),
        "tokens_per_second": round(num_streams * max_tokens / seconds),
        "chunks_per_second": round(clients.num_chunks / seconds),
        "tokens_per_chunk": round(num_streams * max_tokens / clients.num_chunks, 2),
        "failed": clients.num_failed,
        "lag_p50_seconds": percentile(during, 0.5),
        "lag_p99_seconds": percentile(during, 0.99),
        "cpu_share": round(cpu / seconds, 3),
        "cpu_microseconds_per_chunk": round(1e6 * cpu / clients.num_chunks, 1),
        "cpu_microseconds_per_token": round(1e6 * cpu / (num_streams * max_tokens), 1),
    }


@contextlib.contextmanager
def _profiled(arguments: argparse.Namespace, pid: int) -> Iterator[None]:
    if not arguments.profile:
        yield
        return
    command = ["py-spy", "record", "--pid", str(pid), "--duration", str(round(arguments.seconds))]
    with subprocess.Popen(  # noqa: S603 - our own
        [*command, "--rate", "200", "--format", "raw", "--output", arguments.profile]
    ):
        yield


def serve() -> int:
    """The API process: behind `--serve` come its core, what the workers are told, and the server's flags."""
    core, pace = int(sys.argv[2]), sys.argv[3:6]
    del sys.argv[1:6]
    os.sched_setaffinity(0, {core})
    worker = (sys.executable, "-m", "benchmarks.paced_worker", *pace)
    return entry.main(functools.partial(WorkerProcess, command_line=worker))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--step-seconds", type=float, default=0.05)
    parser.add_argument("--tokens", type=int, default=3, help="of each stream in a step")
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--profile", help="file for py-spy's raw record of the API process")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    arguments.cores = cores[0], cores[-1]
    os.sched_setaffinity(0, {cores[-1]})
    for num_streams in arguments.streams:
        print(json.dumps(measure(arguments, num_streams)), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        raise SystemExit(serve())
    main()
