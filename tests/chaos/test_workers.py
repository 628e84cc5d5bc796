"""Workers that die, hang, or give no numbers: who is told what, who notices nothing, and what comes back."""

import concurrent.futures
import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.chaos.conftest import ChaosServer, Control, StartChaos
from tests.e2e.conftest import until

pytestmark = pytest.mark.slow

ROWS = 4
TOLD_SECONDS = 10.0  # ten times the goal
FATAL_TOKEN = 7
METHODS = ("speculative", "mtad", "mmtad")


@dataclass
class Stream:
    """What a client saw of a stream, and when its last byte came (monotonic seconds)."""

    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    ended: float = 0.0
    events: list[str] = field(default_factory=list)


def request_of(**fields: Any) -> dict[str, Any]:
    """With a seed, so that its shape, and with it its text, does not adapt to the load."""
    fixed = {"model": "tiny", "ignore_eos": True, "temperature": 0, "seed": 1}
    return {"prompt": "x", "max_tokens": 8} | fixed | fields


def complete(server: ChaosServer, **fields: Any) -> tuple[int, Any]:
    with server.client() as client:
        response = client.post("/v1/completions", json=request_of(**fields))
    return response.status_code, response.json()


def read_stream(server: ChaosServer, seen: Stream, **fields: Any) -> Stream:
    body = request_of(stream=True, **fields)
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                seen.error = event["error"]["code"] if "error" in event else None
                for choice in event.get("choices", ()):
                    seen.text += choice["text"]
                    seen.finish_reason = choice["finish_reason"]
            if line:
                seen.events.append(line)
    seen.ended = time.monotonic()
    return seen


def num_up(server: ChaosServer) -> float:
    return server.metric("mmtad_worker_up")


@pytest.fixture(scope="module")
def two(start_chaos: StartChaos) -> Iterator[ChaosServer]:
    with start_chaos("--num-workers", "2", "--max-num-seqs", str(ROWS)) as server:
        until(lambda: num_up(server) == 2, 60)
        yield server
        assert server.stop() == 0


@pytest.fixture(scope="module")
def one(start_chaos: StartChaos) -> Iterator[ChaosServer]:
    with start_chaos("--max-num-seqs", str(ROWS)) as server:
        yield server
        assert server.stop() == 0


@contextlib.contextmanager
def held(server: ChaosServer, num_workers: int = 2) -> Iterator[dict[int, Control]]:
    """The hands on all workers, whose steps are held, by process id."""
    until(lambda: num_up(server) == num_workers, 60)
    with contextlib.ExitStack() as stack:
        hands = {pid: stack.enter_context(server.control(pid)) for pid in server.workers()}
        for hand in hands.values():
            hand.ask("hold")
        yield hands


def taken(hands: dict[int, Control]) -> dict[int, int]:
    return {pid: hand.received("GenerateCommand") for pid, hand in hands.items()}


def test_a_death_is_told_to_its_victims_and_to_nobody_else(two: ChaosServer) -> None:
    alone = complete(two, max_tokens=200)[1]["choices"][0]["text"]
    streams = [Stream() for _ in range(2 * ROWS)]
    with concurrent.futures.ThreadPoolExecutor(2 * ROWS) as executor, held(two) as hands:
        before = taken(hands)
        for seen in streams:
            executor.submit(read_stream, two, seen, max_tokens=200)
        # Placed by free rows: as many here as there.
        until(lambda: taken(hands) == {pid: count + ROWS for pid, count in before.items()})
        for hand in (*hands.values(), *hands.values()):
            hand.ask("step")
        until(lambda: all(seen.text for seen in streams))
        victim, survivor = hands
        died = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        hands[survivor].ask("open")
    victims = [seen for seen in streams if seen.error is not None]
    assert [seen.error for seen in victims] == ["worker_failed"] * ROWS
    assert max(seen.ended for seen in victims) - died < TOLD_SECONDS
    assert [seen.text for seen in streams if seen.error is None] == [alone] * ROWS
    assert all(seen.events[-1] == "data: [DONE]" for seen in streams)


def test_what_sent_nothing_is_served_by_the_other_worker(two: ChaosServer) -> None:
    alone = complete(two)[1]["choices"]
    retried = len(two.logged("request_retried"))
    with concurrent.futures.ThreadPoolExecutor(1) as executor, held(two) as hands:
        before = taken(hands)
        answer = executor.submit(complete, two)
        until(lambda: taken(hands) != before)
        (victim,) = (pid for pid, count in taken(hands).items() if count > before[pid])
        (survivor,) = hands.keys() - {victim}
        hands[survivor].ask("open")
        os.kill(victim, signal.SIGKILL)
        status, body = answer.result()
    assert (status, body["choices"]) == (200, alone)
    assert len(two.logged("request_retried")) == retried + 1


def test_one_row_without_numbers_ends_alone(one: ChaosServer) -> None:
    prompts = [[1, 2, number] for number in range(10, 10 + ROWS)]
    alone = [complete(one, prompt=prompt, max_tokens=24)[1] for prompt in prompts]
    one.order(nan_at=12)
    with concurrent.futures.ThreadPoolExecutor(ROWS) as executor:
        answers = list(executor.map(lambda prompt: complete(one, prompt=prompt, max_tokens=24), prompts))
    one.order()
    assert [status for status, _ in answers] == [200, 200, 500, 200]
    assert answers[2][1]["error"]["code"] == "numerical_error"
    for position in (0, 1, 3):
        assert answers[position][1]["choices"] == alone[position]["choices"]
    assert complete(one, prompt=prompts[2], max_tokens=24)[1]["choices"] == alone[2]["choices"]


def test_a_draft_that_fails_leaves_the_target(one: ChaosServer) -> None:
    """Everybody is answered, with the target's own text at temperature 0, and can see it."""
    plain = complete(one, speculative=False, max_tokens=24)[1]
    assert not plain["system_fingerprint"].endswith("-target-only")
    one.order(draft=True)
    for number in range(3):
        assert one.metric("mmtad_draft_enabled") == 1
        status, body = complete(one, speculative={"method": METHODS[number]}, max_tokens=24)
        assert status == 200
        assert body["choices"] == plain["choices"]
    until(lambda: one.metric("mmtad_draft_enabled") == 0)
    assert len(one.logged("draft_failed")) == 3
    one.order()
    status, body = complete(one, max_tokens=24)
    assert body["choices"] == plain["choices"]
    assert body["system_fingerprint"] == plain["system_fingerprint"] + "-target-only"
    assert len(one.logged("draft_failed")) == 3


def test_a_draft_that_fails_in_the_middle_of_streams_changes_no_text(start_chaos: StartChaos) -> None:
    """After some steps of a full house, with as many waiting: everybody is answered, nothing dies."""
    fields = {"speculative": {"method": "speculative"}, "max_tokens": 24}
    streams = [Stream() for _ in range(2 * ROWS)]
    with start_chaos("--max-num-seqs", str(ROWS)) as server:
        plain = complete(server, speculative=False, max_tokens=24)[1]["choices"][0]["text"]
        with (
            concurrent.futures.ThreadPoolExecutor(len(streams)) as executor,
            held(server, num_workers=1) as hands,
        ):
            (before,), (hand,) = taken(hands).values(), hands.values()
            for seen in streams:
                executor.submit(read_stream, server, seen, **fields)
            until(lambda: taken(hands) == {pid: before + len(streams) for pid in hands})
            while sum(bool(seen.text) for seen in streams) < ROWS:
                hand.ask("step")
            server.order(draft=True)
            hand.ask("open")
        assert [(seen.text, seen.finish_reason) for seen in streams] == [(plain, "length")] * len(streams)
        assert server.logged("draft_failed")
        assert server.metric("mmtad_worker_restarts_total") == 0
        assert server.stop() == 0


def test_what_waits_for_the_only_worker_is_served_by_its_successor(one: ChaosServer) -> None:
    """With `target`, whose text does not depend on whether a worker has lost its draft."""
    alone = complete(one, speculative=False)[1]["choices"]
    (worker,) = one.workers()
    with concurrent.futures.ThreadPoolExecutor(ROWS) as executor, one.control(worker) as control:
        control.ask("hold")
        before = control.received("GenerateCommand")
        answers = [executor.submit(complete, one, speculative=False) for _ in range(ROWS)]
        until(lambda: control.received("GenerateCommand") == before + ROWS)
        os.kill(worker, signal.SIGKILL)
        assert [answer.result()[1]["choices"] for answer in answers] == [alone] * ROWS


def test_a_request_that_kills_two_workers_is_not_tried_again(one: ChaosServer) -> None:
    died = one.metric("mmtad_worker_restarts_total")
    one.order(die_at=FATAL_TOKEN)
    status, body = complete(one, prompt=[1, FATAL_TOKEN])
    assert (status, body["error"]["code"]) == (500, "worker_failed")
    until(one.is_ready, 60)
    assert complete(one)[0] == 200
    assert one.metric("mmtad_worker_restarts_total") == died + 2
    (line,) = one.logged("present_at_deaths")
    assert len(line["prompt_sha256"]) == 64


def test_a_worker_that_loads_for_ever_is_replaced(start_chaos: StartChaos) -> None:
    with start_chaos("--worker-load-timeout", "2", wait=False, load="sleep") as server:
        until(lambda: len(server.logged("worker_restarts")) == 1, 60)
        assert server.logged("worker_stuck")[0]["loading"] is True
        assert not server.is_ready()
        assert server.stop() == 0


def test_workers_that_only_die_end_the_server(start_chaos: StartChaos) -> None:
    """Whoever started the server decides what to do about it."""
    with start_chaos(wait=False, load="die") as server:
        assert server.process.wait(60) == 1
        output = server.log.read_text()
        assert "error: 5 workers died within 60 s" in output
        assert len(server.logged("worker_died")) == 5
