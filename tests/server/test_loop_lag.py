"""The lag of the event loop is seen when something holds it up, and in the metrics."""

import time

from server.loop_lag import measured_lag
from tests.server.conftest import Served
from tests.server.fakes import until


async def test_a_blocked_loop_is_seen() -> None:
    lags: list[float] = []
    async with measured_lag(lags.append, probe_seconds=0.01):
        await until(lambda: len(lags) >= 3)
        num_before, blocked_until = len(lags), time.monotonic() + 0.2
        while time.monotonic() < blocked_until:
            pass  # what a handler that computes in the loop would do
        await until(lambda: len(lags) > num_before)
    assert min(lags) >= 0
    # The probe was due at most 0.01 s into the block.
    assert lags[num_before] >= 0.18


async def test_the_server_measures_its_own_loop(served: Served) -> None:
    await until(lambda: (served.metric("mmtad_event_loop_lag_seconds_count") or 0) >= 2)
    text = (await served.client.get("/metrics")).text
    assert 'mmtad_event_loop_lag_seconds_bucket{le="0.1"}' in text
