"""The server's processes on this machine: started for a run, or found by their port, and their CPU time."""

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil

START_SECONDS = 300.0
STOP_SECONDS = 30.0
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@contextlib.contextmanager
def spawned(flags: Sequence[str]) -> Iterator[str]:
    """Starts this server on a free port and gives its URL once it is ready; stops it at the end.

    Every request computes its own prompt unless `flags` say otherwise: methods are compared on equal ones.
    Raises ValueError with the end of its log when it does not come up.
    """
    port = free_port()
    command = [sys.executable, "-m", "server", "--port", str(port), "--no-enable-prefix-caching", *flags]
    with started(command, f"http://127.0.0.1:{port}"):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def started(
    command: Sequence[str],
    url: str,
    *,
    ready: str = "/ready",
    environment: Mapping[str, str] | None = None,
    seconds: float = START_SECONDS,
) -> Iterator[psutil.Process]:
    """The process of any server that `command` starts, once `url` answers at `ready`; stopped at the end.

    Raises ValueError with the end of its log when it does not come up within `seconds`.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)  # noqa: S603 - the caller's
        try:
            if not _comes_up(process, url + ready, seconds):
                log.seek(0)
                end = log.read().decode(errors="replace").strip().splitlines()[-5:]
                raise ValueError("the server did not become ready:\n" + "\n".join(end))
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:  # whatever it still waits for, what was measured is not lost
                process.kill()
                process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _comes_up(process: "subprocess.Popen[bytes]", url: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url, timeout=5).status_code == httpx.codes.OK:
                return True
        time.sleep(0.2)
    return False


class CpuClock:
    """CPU seconds of a process and its children, a proxy for energy where nothing measures joules."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process

    @classmethod
    def of(cls, url: str) -> "CpuClock | None":
        """Of the local process that listens at `url`; None where there is none that can be seen."""
        parts = urlsplit(url)
        if parts.hostname not in LOOPBACK:
            return None
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            listening = psutil.net_connections(kind="tcp")
        except psutil.AccessDenied:  # some systems let only the administrator look
            return None
        for each in listening:
            if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid:
                return cls(psutil.Process(each.pid))
        return None

    def seconds(self) -> float | None:
        """None when the process has gone."""
        try:
            processes = [self._process, *self._process.children(recursive=True)]
            times = [process.cpu_times() for process in processes]
        except psutil.NoSuchProcess:
            return None
        return float(sum(each.user + each.system for each in times))

    def cores(self) -> int:
        """How many the process may use."""
        return len(self._process.cpu_affinity())


def commit() -> str | None:
    """Of the sources that measure."""
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607 - whichever git the caller has
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or None
