"""Requests per minute: of a key, of an address, and what is not counted."""

import time

import pytest

from tests.server.conftest import Serve
from tests.server.test_bad_input import check_error
from tests.server.test_refusals import refusals


class Clock:
    """The wall clock that rates are counted by, so that no minute ends within a test."""

    now = 1_000_000_020.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    return clock


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_each_key_has_its_own_rate(serve: Serve) -> None:
    async with serve(api_key=["one", "two"], requests_per_minute=3) as served:
        for _ in range(3):
            assert (await served.client.get("/v1/models", headers=bearer("one"))).status_code == 200
        refused = await served.client.get("/v1/models", headers=bearer("one"))
        check_error(refused, 429, "rate_limit_exceeded", None)
        assert 1 <= int(refused.headers["retry-after"]) <= 120
        assert (await served.client.get("/v1/models", headers=bearer("two"))).status_code == 200
        assert served.metric("mmtad_requests_rejected_total", reason="rate_limit_exceeded") == 1


@pytest.mark.parametrize("times", [[0, 0, 0], [0, 30, 59], [50, 55, 65], [59, 59, 61], [0, 70, 80]])
async def test_after_the_pause_it_goes_on(serve: Serve, clock: Clock, times: list[int]) -> None:
    """Whenever in the minute the requests came, and a second earlier it does not."""
    start = clock.now
    async with serve(requests_per_minute=3) as served:
        for seconds in times:
            clock.now = start + seconds
            assert (await served.client.get("/v1/models")).status_code == 200
        refused = await served.client.get("/v1/models")
        while refused.status_code == 200:
            refused = await served.client.get("/v1/models")
        check_error(refused, 429, "rate_limit_exceeded", None)
        pause = int(refused.headers["retry-after"])
        clock.now += pause - 1
        assert (await served.client.get("/v1/models")).status_code == 429
        clock.now += 1
        assert (await served.client.get("/v1/models")).status_code == 200


async def test_without_keys_an_address_is_counted_but_not_its_probes(serve: Serve) -> None:
    async with serve(requests_per_minute=1) as served:
        for path in ("/health", "/ready", "/metrics", "/") * 2:
            assert (await served.client.get(path)).status_code != 429
        assert (await served.client.get("/nope")).status_code == 404
        check_error(await served.client.get("/nope"), 429, "rate_limit_exceeded", None)
        check_error(await served.complete(), 429, "rate_limit_exceeded", None)
        assert served.engine.added == []


async def test_wrong_keys_are_not_counted_as_anybody(serve: Serve) -> None:
    async with serve(api_key=["one"], requests_per_minute=1) as served:
        for _ in range(3):
            assert (await served.client.get("/v1/models", headers=bearer("x"))).status_code == 401
        assert (await served.client.get("/v1/models", headers=bearer("one"))).status_code == 200


async def test_a_refusal_is_counted_once(serve: Serve) -> None:
    async with serve(requests_per_minute=1) as served:
        for status in (200, 429):
            assert (await served.complete()).status_code == status
        assert refusals(served) == {"rate_limit_exceeded": 1}
