"""No process unpickles, listens where it need not, or asks anybody outside: seen from in- and outside."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import audit
from tests.chaos.conftest import ChaosServer, StartChaos
from tests.e2e.conftest import ROOT, free_port
from tests.e2e.random_requests import METHODS

pytestmark = pytest.mark.slow

LISTENS = "0A"  # the state of a socket in /proc/net/tcp


def sockets_of(pid: int) -> set[str]:
    links = (str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir())
    return {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}


def tcp(pid: int) -> list[tuple[int, int, str]]:
    """Own port, the other's port and state of every TCP and UDP socket of a process."""
    own, found = sockets_of(pid), []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            local, remote = (int(address.rpartition(":")[2], 16) for address in words[1:3])
            if words[9] in own:
                found.append((local, remote, words[3]))
    return found


def use(server: ChaosServer, metrics_port: int) -> None:
    """Every method, a stream, a chat, the tokenizer, the document and a scrape."""
    body = {"model": "tiny", "prompt": "x", "max_tokens": 8}
    messages = [{"role": "user", "content": "x"}]
    with server.client() as client:
        for method in METHODS:
            fields = {"speculative": {"method": method}, "stream": method == "mmtad"}
            assert client.post("/v1/completions", json=body | fields).status_code == 200
        chat = {"model": "tiny", "messages": messages, "max_tokens": 8}
        assert client.post("/v1/chat/completions", json=chat).status_code == 200
        assert client.post("/tokenize", json={"prompt": "x"}).status_code == 200
        assert client.get("/openapi.json").status_code == 200
        assert client.get(f"http://127.0.0.1:{metrics_port}/metrics").status_code == 200


def test_processes_keep_to_themselves(start_chaos: StartChaos, record_property: Any) -> None:
    metrics_port = free_port()
    with start_chaos("--metrics-port", str(metrics_port)) as server:
        (worker,) = server.workers()
        with server.client() as client:
            client.get("/health")
            use(server, metrics_port)
            found = {"api": tcp(server.process.pid), "worker": tcp(worker)}
        events = {
            "api": audit.read(server.folder, server.process.pid),
            "worker": audit.read(server.folder, worker),
        }
        assert server.stop() == 0
    names = {name: [event for event, *_ in listed] for name, listed in events.items()}
    record_property("classes unpickled", sum(listed.count("pickle.find_class") for listed in names.values()))
    record_property(
        "listening sockets", [state for *_, state in found["api"] + found["worker"]].count(LISTENS)
    )
    record_property("connections to others", sum(listed.count("socket.connect") for listed in names.values()))
    ports = {server.port, metrics_port}
    assert {local for local, _, state in found["api"] if state == LISTENS} == ports
    assert {local for local, _, _ in found["api"]} == ports
    assert found["worker"] == []
    # The hand of the tests, and how torch's builds for CUDA look for a library when they are imported.
    expected = {repr(str(server.folder / f"{worker}.sock")), "'/sbin/ldconfig'"}
    assert [event for event in events["worker"] if not expected & set(event)] == []
    assert set(names["api"]) == {"socket.bind", "subprocess.Popen"}
    assert names["api"].count("socket.bind") == len(ports)


def test_what_is_unpickled_is_seen(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from tests.chaos import audit; audit.start(pathlib.Path(sys.argv[1]));"
        "import pickle; pickle.loads(pickle.dumps(pathlib.Path))"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT) as process:
        assert process.wait(60) == 0
    assert ["pickle.find_class", "'pathlib'", "'Path'"] in audit.read(tmp_path, process.pid)
