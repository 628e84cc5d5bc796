"""The load test as a program: this server started for it, another server, and refusals."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serve
from tests.e2e.conftest import free_port, pair

__all__ = ["pair"]


class OtherServer(BaseHTTPRequestHandler):
    """Completions as other servers give them: no roles of models, no metrics, five tokens a chunk."""

    protocol_version = "HTTP/1.1"
    bodies: list[dict[str, Any]]
    interrupt_at: int | None

    def do_GET(self) -> None:
        self._answer("application/json", json.dumps({"data": [{"id": "other"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.bodies.append(body)
        if len(self.bodies) == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        chunks = [{"choices": [{"text": "five"}]}] * 2 + [{"choices": [], "usage": {"completion_tokens": 10}}]
        events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        self._answer("text/event-stream", "".join([*events, "data: [DONE]\n\n"]))

    def _answer(self, kind: str, text: str) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def other() -> Iterator[str]:
    OtherServer.bodies, OtherServer.interrupt_at = [], None
    with ThreadingHTTPServer(("127.0.0.1", 0), OtherServer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """The document in the last line that the program prints."""
    monkeypatch.setattr("sys.argv", ["serve", *arguments])
    serve.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_this_server_under_every_method(
    pair: tuple[Path, Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, saved = tmp_path / "report.html", tmp_path / "result.json"
    arguments = [
        "--spawn",
        "--concurrency",
        "1",
        "4",
        "--rates",
        "0.7",
        "--requests",
        "6",
        "--max-tokens",
        "8",
    ]
    methods = ("target", "speculative-4x1", "mtad-4x4", "mmtad-4x4")  # one that adapts may rest its draft
    arguments += [
        "--methods",
        *methods,
        "--report",
        str(report),
        "--json",
        str(saved),
        "--server-flags",
        "--model",
        str(pair[0]),
    ]
    arguments += ["--energy-source", "none"]
    arguments += ["--speculative-config.model", str(pair[1])]
    result = program(capsys, monkeypatch, *arguments)
    points = {(each["method"], each["mode"], each.get("concurrency")): each for each in result["points"]}
    assert {method for method, _, _ in points} == set(methods)
    assert len(points) == 4 * 3
    for (method, mode, concurrency), each in points.items():
        assert each["errors"] == {}
        assert each["requests"] == (16 if concurrency == 4 else 6)
        assert each["tokens"] == 8 * each["requests"]
        assert each["cpu_seconds_per_token"] > 0
        assert "joules_per_token" not in each
        assert ("accepted_by_depth" in each) == (method != "target")
        assert (mode == "open") == ("rate" in each)
    assert json.loads(saved.read_text()) == result
    assert "mmtad" in report.read_text()
    compared = program(capsys, monkeypatch, "--compare", str(saved), str(saved))
    assert {row["tokens_per_second"] for row in compared["ratios"]} == {1.0}


def test_another_server_is_asked_for_no_method(
    other: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--url", other, "--concurrency", "2", "--rates", "--requests", "6", "--repeats", "2"]
    result = program(capsys, monkeypatch, *arguments)
    (point,) = result["points"]
    assert point["method"] == "server"
    assert result["conditions"]["complete"]
    assert point["tokens"] == 2 * 8 * 10
    assert len(OtherServer.bodies) == serve.DISCARDED + 2 * 8
    assert not any("speculative" in body for body in OtherServer.bodies)
    assert {body["model"] for body in OtherServer.bodies} == {"other"}


def test_an_interrupt_keeps_what_was_measured(
    other: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    OtherServer.interrupt_at = serve.DISCARDED + 6 + 3  # in the second point
    arguments = ["--url", other, "--concurrency", "1", "2", "--rates", "--requests", "6"]
    handler = signal.getsignal(signal.SIGINT)
    try:
        result = program(capsys, monkeypatch, *arguments)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert [point["concurrency"] for point in result["points"]] == [1]
    assert not result["conditions"]["complete"]


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["serve", "--url", f"http://127.0.0.1:{free_port()}"])
    with pytest.raises(SystemExit, match="does not list its models"):
        serve.main()


def test_a_server_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["serve", "--spawn", "--server-flags", "--no-such-flag"])
    with pytest.raises(SystemExit, match="did not become ready:\n.*no-such-flag"):
        serve.main()


@pytest.mark.parametrize("flags", [["--concurrency", "0"], ["--rates", "-1"], ["--repeats", "0"]])
def test_loads_that_are_none(flags: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit):
        serve.parse_arguments(["--url", "http://x", *flags])
    assert "must be positive" in capsys.readouterr().err
