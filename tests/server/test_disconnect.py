"""A client that leaves frees its row, wherever it stood; a server that fails tells every client."""

import asyncio
import json
from typing import Any

import pytest

from server import streaming
from server.messages import CancelCommand
from tests.server.conftest import Serve, Served
from tests.server.fakes import ScriptedEngine, until
from tests.server.test_bad_input import check_error
from tests.server.test_completions import events


class Client:
    """One raw ASGI exchange whose connection the test can end."""

    def __init__(self, served: Served, **fields: Any) -> None:
        self.sent: list[dict[str, Any]] = []
        self.gone = asyncio.Event()
        self._body: bytes | None = json.dumps({"model": "tiny", "prompt": "x", **fields}).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"content-type", b"application/json")],
            "client": ("test", 1),
            "server": ("test", 80),
        }
        self.task = asyncio.ensure_future(served.app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


def is_idle(served: Served) -> bool:
    return served.engine.num_running == 0 and served.engine.num_waiting == 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 8])
async def test_leaving_before_the_first_token(served: Served, stream: bool, n: int) -> None:
    served.engine.gate.clear()
    client = Client(served, stream=stream, n=n)
    await until(lambda: len(served.engine.added) == n)
    client.gone.set()
    await asyncio.wait_for(client.task, 5)
    assert any(isinstance(command, CancelCommand) for command in served.worker.commands)
    served.engine.gate.set()
    await until(lambda: is_idle(served))
    assert served.engine.num_steps <= 2
    await until(lambda: requests(served, "abort") == 1)
    assert served.metric("mmtad_requests_running", model="tiny") == 0


def requests(served: Served, reason: str) -> float | None:
    return served.metric("mmtad_requests_total", model="tiny", method="mmtad", finish_reason=reason)


async def test_leaving_in_the_middle_of_a_stream(serve: Serve) -> None:
    async with serve(ScriptedEngine(tokens_per_step=1, hold_after=1)) as served:
        client = Client(served, stream=True)
        await until(lambda: b"data: " in client.body)
        client.gone.set()
        await asyncio.wait_for(client.task, 5)
        served.engine.gate.set()
        await until(lambda: is_idle(served))
        assert b"[DONE]" not in client.body
        assert (await served.complete()).status_code == 200


async def test_rows_that_wait_are_given_up_too(serve: Serve) -> None:
    async with serve(ScriptedEngine(max_num_seqs=1)) as served:
        served.engine.gate.clear()
        first = Client(served, stream=True)
        await until(lambda: len(served.engine.added) == 1)
        second = Client(served)
        await until(lambda: len(served.worker.commands) == 2)
        second.gone.set()
        await asyncio.wait_for(second.task, 5)
        served.engine.gate.set()
        await asyncio.wait_for(first.task, 5)
        assert first.body.endswith(b"[DONE]\n\n")
        await until(lambda: is_idle(served))


class StuckClient(Client):
    """Its connection takes nothing."""

    async def _send(self, message: Any) -> None:
        await super()._send(message)
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)


async def test_a_reader_that_takes_nothing_frees_its_rows(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "READER_SECONDS", 0.01)
    async with serve(ScriptedEngine(tokens_per_step=1, hold_after=1)) as served:
        client = StuckClient(served, stream=True)
        await asyncio.wait_for(client.task, 5)
        served.engine.gate.set()
        await until(lambda: requests(served, "abort") == 1)
        assert is_idle(served)


async def test_disconnect_in_the_body(served: Served) -> None:
    client = Client(served)
    client._body = None
    client.gone.set()
    await asyncio.wait_for(client.task, 5)
    assert served.engine.added == []


async def test_slots_are_released_by_every_end(serve: Serve) -> None:
    """One slot only: any leak would refuse the next request."""
    async with serve(max_num_seqs=1, max_num_queued_reqs=0) as served:
        await served.complete()
        await served.complete(stream=True)
        await served.complete(n="x")
        served.engine.failures.append(RuntimeError("broken"))
        await served.complete()
        client = Client(served, stream=True)
        client.gone.set()
        await asyncio.wait_for(client.task, 5)
        assert (await served.complete()).status_code == 200


async def test_full_queue_is_503_before_the_body(serve: Serve) -> None:
    async with serve(max_num_seqs=1, max_num_queued_reqs=1) as served:
        served.engine.gate.clear()
        running = [Client(served), Client(served, stream=True)]
        await until(lambda: len(served.worker.commands) == 2)
        response = await served.client.post(
            "/v1/completions", content=b"not even JSON", headers={"content-type": "application/json"}
        )
        check_error(response, 503, "queue_full", None)
        assert int(response.headers["retry-after"]) >= 1
        served.engine.gate.set()
        await asyncio.gather(*(client.task for client in running))
        assert [client.sent[0]["status"] for client in running] == [200, 200]
        assert served.metric("mmtad_requests_rejected_total", reason="queue_full") == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_sequences_beyond_the_queue_are_503(serve: Serve, stream: bool) -> None:
    """The slot was free, the rows are not: an early failure of a stream has its own status."""
    async with serve(max_num_seqs=1, max_num_queued_reqs=3) as served:
        served.engine.gate.clear()
        running = Client(served, n=3)
        await until(lambda: len(served.engine.added) == 3)
        response = await served.complete(n=2, stream=stream)
        check_error(response, 503, "queue_full", None)
        served.engine.gate.set()
        await running.task
        assert (await served.complete(n=8)).status_code == 200  # larger than the queue, but alone


@pytest.mark.parametrize("stream", [True, False])
async def test_failed_step_before_any_token(served: Served, stream: bool) -> None:
    served.engine.failures.append(RuntimeError("broken"))
    check_error(await served.complete(stream=stream), 500, "worker_failed", None)
    assert (await served.complete()).status_code == 200
    assert requests(served, "error") == 1


@pytest.mark.parametrize("failure", ["step", "death"])
async def test_failure_in_the_middle_of_a_stream(serve: Serve, failure: str) -> None:
    async with serve(ScriptedEngine(tokens_per_step=1, hold_after=1)) as served:
        client = Client(served, stream=True)
        await until(lambda: b"data: " in client.body)
        if failure == "step":
            served.engine.failures.append(RuntimeError("broken"))
        else:
            served.worker.die()
        served.engine.gate.set()
        await asyncio.wait_for(client.task, 5)
        assert client.sent[0]["status"] == 200
        blocks = client.body.decode().split("\n\n")
        error = json.loads(blocks[-3].removeprefix("data: "))["error"]
        assert (error["type"], error["code"]) == ("server_error", "worker_failed")
        assert blocks[-2:] == ["data: [DONE]", ""]


async def test_death_retries_what_sent_nothing_once(served: Served) -> None:
    """Present at two deaths, a request may be their cause: it is told, and not tried again."""
    served.engine.gate.clear()
    clients = [Client(served, stream=number % 2 == 0) for number in range(6)]
    await until(lambda: len(served.worker.commands) == 6)
    first = list(served.worker.commands)
    served.worker.die()
    assert served.pool.refusal == "no_worker"
    assert not any(client.task.done() for client in clients)
    assert served.pool.model is not None
    served.worker.say_ready(served.pool.model)
    await until(lambda: len(served.worker.commands) == 12)
    assert served.worker.commands[6:] == first
    served.worker.die()
    await asyncio.wait_for(asyncio.gather(*(client.task for client in clients)), 5)
    assert [client.sent[0]["status"] for client in clients] == [500] * 6
    served.engine.gate.set()


async def test_drain_lets_running_requests_finish(served: Served) -> None:
    served.engine.gate.clear()
    client = Client(served, stream=True)
    await until(lambda: len(served.engine.added) == 1)
    drain = asyncio.ensure_future(served.pool.drain(5))
    await until(lambda: served.pool.draining)
    served.engine.gate.set()
    await asyncio.wait_for(drain, 5)
    assert client.body.endswith(b"[DONE]\n\n")
    assert b"error" not in client.body


@pytest.mark.parametrize("stream", [True, False])
async def test_drain_tells_those_who_take_too_long(served: Served, stream: bool) -> None:
    served.engine.gate.clear()
    client = Client(served, stream=stream)
    await until(lambda: len(served.engine.added) == 1)
    await served.pool.drain(0.01)
    await asyncio.wait_for(client.task, 5)
    assert client.sent[0]["status"] == 503
    assert json.loads(client.body)["error"]["code"] == "draining"
    served.engine.gate.set()


async def test_silence_is_filled_with_comments(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_SECONDS", 0.01)
    served.engine.gate.clear()
    client = Client(served, stream=True)
    await until(lambda: client.body.count(b": keep-alive\n\n") >= 2)
    served.engine.gate.set()
    await asyncio.wait_for(client.task, 5)
    assert client.sent[0]["status"] == 200
    assert client.body.endswith(b"data: [DONE]\n\n")


async def test_error_after_a_comment_is_an_event(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_SECONDS", 0.01)
    served.engine.gate.clear()
    client = Client(served, stream=True)
    await until(lambda: b": keep-alive" in client.body)
    served.engine.failures.append(RuntimeError("broken"))
    served.engine.gate.set()
    await asyncio.wait_for(client.task, 5)
    assert b'"code":"worker_failed"' in client.body
    assert client.body.endswith(b"data: [DONE]\n\n")


async def test_broken_stream_is_told_without_details(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret details")

    monkeypatch.setattr("server.choice_text.ChoiceText.push", broken)
    response = await served.complete(stream=True)
    check_error(response, 500, None, None)
    assert "secret" not in response.text
    await until(lambda: is_idle(served))


async def test_unstarted_generation_holds_nothing(served: Served) -> None:
    """The trap: the finally of a generator that never ran does not run."""
    generator = served.pool.generate([], model="tiny", arrived=0.0)
    await generator.aclose()
    assert served.pool._reserved.num_sequences == 0
    assert [event async for event in served.pool.generate([], model="tiny", arrived=0.0)] == []


async def test_streams_keep_working_beside_a_lost_one(serve: Serve) -> None:
    async with serve(ScriptedEngine(tokens_per_step=1, hold_after=1)) as served:
        leaving = Client(served, stream=True)
        await until(lambda: b"data: " in leaving.body)
        staying = asyncio.ensure_future(served.complete(stream=True))
        leaving.gone.set()
        await leaving.task
        served.engine.gate.set()
        text = "".join(chunk["choices"][0]["text"] for chunk in events(await staying))
        assert text == "abcdefghij"


async def test_a_stopped_pool_tells_who_still_waits(serve: Serve) -> None:
    """As when the server ends without a drain: nobody is left hanging."""
    async with serve() as served:
        served.engine.gate.clear()
        client = Client(served)
        await until(lambda: len(served.engine.added) == 1)
        served.worker.stop_is_deaf = True
        await served.pool.stop()
        await asyncio.wait_for(client.task, 5)
        assert client.sent[0]["status"] == 500
        served.worker.stop_is_deaf = False
        served.engine.gate.set()
