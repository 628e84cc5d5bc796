"""What a row of bad input is made of: a request, and the answer that it must get."""

import io
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import RunningServer, Start
from tests.server.conftest import Serve
from tests.server.test_bad_input import check_error

JSON = {"content-type": "application/json"}
SMALL = {"model": "tiny", "prompt": "x", "temperature": 0, "max_tokens": 4}


@dataclass(frozen=True)
class World:
    """The servers that a case may ask; each is started when it is first needed."""

    request: pytest.FixtureRequest

    @property
    def server(self) -> RunningServer:
        running: RunningServer = self.request.getfixturevalue("server")
        return running

    @property
    def client(self) -> httpx.Client:
        opened: httpx.Client = self.request.getfixturevalue("client")
        return opened

    @property
    def guarded(self) -> RunningServer:
        running: RunningServer = self.request.getfixturevalue("guarded")
        return running

    @property
    def start(self) -> Start:
        factory: Start = self.request.getfixturevalue("start")
        return factory

    @property
    def serve_port(self) -> Serve:
        """The application in this process, where a case needs other limits than the real ones."""
        factory: Serve = self.request.getfixturevalue("serve_port")
        return factory

    @property
    def logs(self) -> io.StringIO:
        """What the application in this process logs."""
        stream: io.StringIO = self.request.getfixturevalue("logs")
        return stream


@dataclass(frozen=True)
class Answer:
    """What must come back; an error when the status is not 200."""

    status: int = 200
    code: str | None = None
    param: str | None = None
    message: str = ""  # a part of it
    within: float | None = None  # seconds; ten times the goal, for the best of three
    check: Callable[[Any], None] | None = None  # of the body of a 200
    secrets: tuple[str, ...] = ()  # what was sent is not in an error

    def hold(self, response: httpx.Response) -> None:
        if self.status == 200:
            assert response.status_code == 200, response.text[:500]
            body = response.json()
            if self.check is not None:
                self.check(body)
        else:
            assert self.message in check_error(response, self.status, self.code, self.param)
            assert not any(secret in response.text for secret in self.secrets)


@dataclass(frozen=True)
class Fields:
    """A JSON body: these fields over a small valid request."""

    row: int
    fields: dict[str, Any]
    answer: Answer

    def run(self, world: World) -> None:
        body = {name: value for name, value in (SMALL | self.fields).items() if value is not OMITTED}
        sent = tuple(value for value in self.fields.values() if isinstance(value, str) and len(value) > 4)
        Body(self.row, json.dumps(body).encode(), replace(self.answer, secrets=sent)).run(world)

    @property
    def name(self) -> str:
        return json.dumps(self.fields, default=lambda _: "omitted")


OMITTED: Any = object()


@dataclass(frozen=True)
class Body:
    """The bytes of a body, sent to the shared server."""

    row: int
    body: bytes
    answer: Answer
    headers: dict[str, str] = field(default_factory=lambda: JSON)
    method: str = "POST"
    path: str = "/v1/completions"

    def run(self, world: World) -> None:
        seconds = []
        for _ in range(1 if self.answer.within is None else 3):
            started = time.perf_counter()
            response = world.client.request(self.method, self.path, content=self.body, headers=self.headers)
            seconds.append(time.perf_counter() - started)
            self.answer.hold(response)
        assert self.answer.within is None or min(seconds) < self.answer.within, seconds

    @property
    def name(self) -> str:
        head = "" if self.method == "POST" else f"{self.method} "
        head += "" if self.path == "/v1/completions" else self.path
        extra = "" if self.headers is JSON else str(self.headers)
        return f"{head}{extra}{self.body[:40]!r}"


@dataclass(frozen=True)
class Raw:
    """Bytes on a socket; the answer is an error of one of these statuses, then the connection ends."""

    row: int
    name: str
    sent: bytes
    statuses: tuple[int, ...]
    code: str | None = None

    def run(self, world: World) -> None:
        response = exchange(world.server, self.sent)
        assert response.status_code in self.statuses
        check_error(response, response.status_code, self.code, None)


@dataclass(frozen=True)
class Behaviour:
    """What takes more than one request to show."""

    row: int
    run: Callable[[World], None]

    @property
    def name(self) -> str:
        return self.run.__name__


Case = Fields | Body | Raw | Behaviour


@contextmanager
def connect(server: RunningServer) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        yield connection


def exchange(server: RunningServer, sent: bytes) -> httpx.Response:
    """Sends bytes and reads to the end of the connection, which is the server's to close."""
    with connect(server) as connection:
        connection.sendall(sent)
        return parse_response(read_to_end(connection))


def read_to_end(connection: socket.socket) -> bytes:
    received = bytearray()
    try:
        while piece := connection.recv(65_536):
            received += piece
    except ConnectionResetError:
        assert received, "reset without an answer"
    return bytes(received)


def read_response(connection: socket.socket) -> httpx.Response:
    """The next response of a connection that stays open; its length is declared."""
    received = b""
    while True:
        received += connection.recv(65_536)
        _, end, body = received.partition(b"\r\n\r\n")
        if end and len(body) >= int(parse_response(received).headers["content-length"]):
            return parse_response(received)


def parse_response(received: bytes) -> httpx.Response:
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = [(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    return httpx.Response(int(status.split()[1]), headers=headers, content=body)
