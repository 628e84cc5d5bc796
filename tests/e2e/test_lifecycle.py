"""Start, faults and end of real server processes."""

import json
import os
import signal
import socket
import ssl
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Start, free_port, is_alive, launch, until
from tests.e2e.tiny import write_model
from tests.programs import program

pytestmark = pytest.mark.slow

LONG = {
    "model": "tiny",
    "prompt": "x",
    "max_tokens": 400,
    "ignore_eos": True,
    "stream": True,
    "temperature": 0,
}


def run_to_end(arguments: list[str], folder: Path, seconds: float = 60.0) -> tuple[int, str, float]:
    """Exit code, output and seconds of a server that ends by itself."""
    started = time.monotonic()
    with (folder / "log").open("wb") as output, launch(arguments, output) as process:
        try:
            code = process.wait(seconds)
        finally:
            process.kill()
    return code, (folder / "log").read_text(), time.monotonic() - started


def test_a_dead_worker_is_told_and_replaced(start: Start) -> None:
    with start() as server:
        (worker,) = server.workers()
        with server.client() as client, client.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            os.kill(worker, signal.SIGKILL)
            rest = [line for line in lines if line]
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "worker_failed"
        assert rest[-1] == "data: [DONE]"
        with server.client() as client:
            assert client.get("/health").status_code == 200
            answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_worker")
        until(server.is_ready, 60)
        with server.client() as client:
            assert client.post("/v1/completions", json={"model": "tiny", "prompt": "x"}).status_code == 200
        assert server.workers() != [worker]
        assert server.metric("mmtad_worker_restarts_total") == 1
        assert server.stop() == 0


def test_sigterm_finishes_what_runs(start: Start) -> None:
    with start() as server:
        workers = server.workers()
        with server.client() as client, client.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: not server.is_ready())
            with server.client() as other:
                refused = other.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(20) == 0
        assert not any(map(is_alive, workers))
        (ended,) = [line for line in server.log.read_text().splitlines() if '"worker_ended"' in line]
        assert json.loads(ended)["status"] == 0


def test_shutdown_timeout_ends_what_takes_too_long(start: Start) -> None:
    with start("--shutdown-timeout", "0") as server:
        with server.client() as client, client.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "draining"
        assert server.process.wait(10) == 0


def test_the_ready_line_says_what_is_served(start: Start) -> None:
    with start() as server:
        until(lambda: '"event": "ready"' in server.log.read_text())  # written behind the first answer
        lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
        (line,) = [line for line in lines if line["event"] == "ready"]
        assert line["url"] == server.url
        assert (line["model"], line["method"], line["device"]) == ("tiny", "mmtad", "cpu")
        assert line["memory_mib"] >= 0
        secret = "never-in-a-log"
        with server.client() as client:
            client.post("/v1/completions", json={"model": "tiny", "prompt": secret, "user": secret})
            client.post("/v1/completions", json={"model": secret, "prompt": secret, "n": secret})
        assert server.stop() == 0
        assert secret not in server.log.read_text()


def test_a_taken_port_is_found_before_the_models_load(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        code, output, seconds = run_to_end(["--model", str(pair[0]), "--port", str(port)], tmp_path)
    assert code == 1
    assert output.count("\n") == 1
    assert "--port" in output
    assert seconds < 5


@pytest.mark.parametrize("fault", ["vocabulary", "missing"])
def test_a_pair_that_cannot_be_served_is_one_line(
    fault: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    draft = tmp_path / "draft"
    if fault == "vocabulary":
        write_model(draft, seed=3, layers=1, hidden=32, vocab_size=300)
        vocabulary = json.loads((draft / "tokenizer.json").read_text())
        vocabulary["model"]["vocab"] |= {"<more>": 260}
        (draft / "tokenizer.json").write_text(json.dumps(vocabulary))
    arguments = [
        "--model",
        str(pair[0]),
        "--speculative-config.model",
        str(draft),
        "--port",
        str(free_port()),
    ]
    code, output, _ = run_to_end(arguments, tmp_path)
    assert code == 2
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert ("vocabulary" if fault == "vocabulary" else str(draft)) in errors[0]
    assert "Traceback" not in output


def test_huge_headers_are_refused(start: Start) -> None:
    with start(wait=False) as server:
        until(lambda: server.log.read_text().count("loading") > 0)
        with server.client() as client:
            answer = client.get("/health", headers={"x-huge": "x" * 100_000})
            assert answer.status_code in (400, 431)
            assert client.get("/health").status_code == 200


def test_keys_and_a_proxy_path(start: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("the-key\n")
    with start("--api-key-file", str(keys), "--host", "0.0.0.0", "--root-path", "/llm") as server:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 2}
        with server.client() as client:
            assert client.post("/v1/completions", json=body).status_code == 401
            headers = {"authorization": "Bearer the-key"}
            assert client.post("/v1/completions", json=body, headers=headers).status_code == 200
        assert server.stop() == 0
        assert "the-key" not in server.log.read_text()


def test_https(start: Start, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = [program("openssl"), "req", "-x509", "-newkey", "ed25519", "-nodes", "-days", "2", *subject]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    with start("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), wait=False) as server:
        trusted = ssl.create_default_context(cafile=certificate)
        with httpx.Client(base_url=f"https://127.0.0.1:{server.port}", verify=trusted) as client:
            until(lambda: server.log.read_text().count("loading") > 0)
            assert client.get("/health").status_code == 200
        assert server.stop() == 0


def test_help_needs_no_models(tmp_path: Path) -> None:
    code, output, _ = run_to_end(["--help"], tmp_path)
    assert code == 0
    for flag in ("--model", "--speculative-config", "--max-num-seqs", "--allow-unauthenticated"):
        assert flag in output


def test_connection_is_refused_after_the_end(start: Start) -> None:
    with start(wait=False) as server:
        until(lambda: server.log.read_text().count("loading") > 0)
        assert server.stop() == 0
        with server.client() as client, pytest.raises(httpx.ConnectError):
            client.get("/health")
