"""Workers whose device has no memory left: smaller batches serve everybody, only what never fits is told."""

import concurrent.futures
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.chaos.conftest import ChaosServer, Control, StartChaos
from tests.chaos.test_workers import Stream, complete, read_stream
from tests.e2e.conftest import until

pytestmark = pytest.mark.slow

ROWS = 8
BAD_TOKEN = 60


@pytest.fixture(scope="module")
def server(start_chaos: StartChaos) -> Iterator[ChaosServer]:
    with start_chaos("--max-num-seqs", str(ROWS)) as server:
        yield server
        assert server.metric("mmtad_worker_restarts_total") == 0
        assert server.stop() == 0


def out_of_memory(server: ChaosServer) -> float:
    return server.metric("mmtad_out_of_memory_total")


def in_parallel(server: ChaosServer, fields: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    with concurrent.futures.ThreadPoolExecutor(len(fields)) as executor:
        return list(executor.map(lambda each: complete(server, **each), fields))


def test_smaller_batches_serve_everybody(server: ChaosServer) -> None:
    requests = [{"prompt": [1, 2, number], "max_tokens": 60} for number in range(10, 10 + ROWS)]
    alone = [complete(server, **fields)[1]["choices"] for fields in requests]
    server.order(most_rows=2)
    answers = in_parallel(server, requests)
    server.order()
    assert [status for status, _ in answers] == [200] * ROWS
    assert [body["choices"] for _, body in answers] == alone
    assert out_of_memory(server) >= 1
    assert all(entry["lost"] == 0 for entry in server.logged("out_of_memory"))


def test_what_never_fits_is_told_and_nobody_else(server: ChaosServer) -> None:
    requests = [{"prompt": [1, 2, number], "max_tokens": 24} for number in (10, 11, BAD_TOKEN, 12)]
    alone = [complete(server, **fields)[1].get("choices") for fields in requests]
    server.order(no_memory_at=BAD_TOKEN)
    answers = in_parallel(server, requests)
    server.order()
    assert [status for status, _ in answers] == [200, 200, 503, 200]
    for position in (0, 1, 3):
        assert answers[position][1]["choices"] == alone[position]
    error = answers[2][1]["error"]
    assert (error["type"], error["code"]) == ("overloaded_error", "out_of_memory")
    assert "memory" in error["message"]


@contextlib.contextmanager
def half_sent(server: ChaosServer) -> Iterator[tuple[Stream, Control]]:
    """A stream of which some text was sent, its worker's steps held; at the end it is read to its end."""
    seen = Stream()
    with concurrent.futures.ThreadPoolExecutor(1) as executor, server.control() as control:
        control.ask("hold")
        before = control.received("GenerateCommand")
        reading = executor.submit(read_stream, server, seen, max_tokens=200)
        until(lambda: control.received("GenerateCommand") > before)
        for _ in range(3):
            control.ask("step")
        until(lambda: bool(seen.text))
        yield seen, control
        control.ask("open")
        reading.result()


def test_a_stream_pauses_and_goes_on(server: ChaosServer) -> None:
    """Its text was half sent when memory ran out: the rest follows, once, as if nothing had been."""
    alone = complete(server, max_tokens=200)[1]["choices"][0]["text"]
    before = out_of_memory(server)
    with half_sent(server) as (seen, control):
        server.order(most_rows=0)
        control.ask("step")
        server.order()
    assert out_of_memory(server) == before + 1
    assert (seen.text, seen.error, seen.finish_reason) == (alone, None, "length")


def test_a_stream_that_fails_says_so(server: ChaosServer) -> None:
    with half_sent(server) as (seen, _):
        server.order(most_rows=0)
    server.order()
    assert seen.error == "out_of_memory"
    assert seen.events[-1] == "data: [DONE]"
    assert json.loads(seen.events[-2].removeprefix("data: "))["error"]["type"] == "overloaded_error"
