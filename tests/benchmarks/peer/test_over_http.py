"""Servers in turn: what their rows say, that they sleep meanwhile, and what of a server that cannot run."""

import sys

import psutil
import pytest

from benchmarks.load.processes import free_port, started
from benchmarks.peer.over_http import Entry, rows, suspend, take_turns
from benchmarks.peer.servers import Server
from tests.e2e.conftest import until

FAKE = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body.get("refuse"):
            self.answer(400, {})
        else:
            text = body["prompt"] + body.get("end", "!")
            self.answer(200, {"choices": [{"text": text}], "usage": {"completion_tokens": 3}})

    def answer(self, status, content):
        content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def server(port: int) -> Server:
    command = [sys.executable, "-c", FAKE, str(port)]
    return Server(True, "1.0", "float32", command, port, "m", {})


def test_rows_of_servers_and_of_one_that_refuses() -> None:
    fake = server(free_port())
    with started(fake.command, fake.url, ready=fake.ready) as process:
        suspend(process)
        entries = [
            Entry("plain", fake, process, {}),
            Entry("other", fake, process, {"end": "?"}),
            Entry("broken", fake, process, {"refuse": True}),
        ]
        failed = take_turns(entries, ["a", "b", "c"], [1, 2], 2, 60.0, lambda _: None)
        until(lambda: process.status() == psutil.STATUS_STOPPED)  # a signal takes a moment to arrive
        found = rows(entries)
        for each in (process, *process.children()):
            each.resume()
    assert [(row["name"], row["batch"]) for row in found] == [
        ("plain", 1), ("plain", 2), ("other", 1), ("other", 2),
    ]  # fmt: skip
    assert all(row["tokens"] == 9 and row["repeats"] == 2 and row["tokens_per_s"] > 0 for row in found)
    assert [row["same_texts"] for row in found] == [1, 1, 0, 0]
    (broken,) = failed
    assert broken["name"] == "broken"
    assert "3 of 3 requests failed" in broken["reason"]
    assert "400" in broken["reason"]


def test_a_server_that_ends_by_itself_is_told_with_its_last_words() -> None:
    port = free_port()
    command = [sys.executable, "-c", "raise SystemExit('no such device')"]
    with (
        pytest.raises(ValueError, match="no such device"),
        started(command, f"http://127.0.0.1:{port}", ready="/health"),
    ):
        pass
