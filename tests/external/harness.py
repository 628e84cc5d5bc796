"""Clients that nobody here wrote, each in an environment of its own, against a server on loopback."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from tests.e2e.conftest import ROOT, clean_environment, free_port

TARGET, DRAFT = ROOT / "models" / "tiny-sql", ROOT / "models" / "tiny-sql-draft"
MODEL = "tiny-sql"
INSIDE = Path(__file__).parent / "inside"
START_SECONDS = 180.0


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[str]:
    """The URL of a server with the small SQL pair; its log is shown when something fails."""
    port = free_port()
    command = [sys.executable, "-m", "server", "--model", str(TARGET), "--port", str(port)]
    command += ["--speculative-config.model", str(DRAFT), "--served-model-name", MODEL, *flags]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stdout=log, stderr=log) as process,
    ):
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until_ready(url, process)
            yield url
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read()[-10_000:].decode(errors="replace"))
            raise
        finally:
            process.terminate()
            process.wait(60)


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended by itself"
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        time.sleep(0.1)
    raise TimeoutError("the server is not ready")


def run(command: Sequence[str | Path], *, offline: bool = True, seconds: float = 900.0) -> str:
    """The output of a client, which is also shown; fails when the client does."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "COLUMNS": "160"}
    if not offline:
        del variables["HF_HUB_OFFLINE"]
    done = subprocess.run(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds, check=False
    )
    output = done.stdout.decode(errors="replace")
    sys.stdout.write(output)
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}"
    return output
