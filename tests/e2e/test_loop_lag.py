"""The event loop and the probes answer in time while 32 streams run and broken requests arrive."""

from typing import Any

import pytest

from benchmarks.loop_lag import PROBES, measure
from tests.e2e.conftest import RunningServer

pytestmark = pytest.mark.slow

LAG_CEILING_SECONDS = 0.25  # of the bucket that holds ten times the goal
PROBE_CEILING_SECONDS = {"/health": 0.5, "/ready": 0.5, "/metrics": 1.0}  # ten times the goals


async def test_the_event_loop_stays_free(server: RunningServer, long: bool, record_property: Any) -> None:
    figures = await measure(server.url, 60 if long else 12)
    record_property("lag p99, max in s", (figures["p99_seconds"], figures["max_seconds"]))
    assert figures["p99_seconds"] <= LAG_CEILING_SECONDS, figures
    answers = figures["answers"]
    assert answers["stream 200, events"] >= 32
    assert [answer for answer in answers if " 5" in answer] == []
    assert {"malformed 400", "mutated 400"} <= answers.keys()


async def test_probes_answer_while_every_row_is_taken(
    server: RunningServer, long: bool, record_property: Any
) -> None:
    figures = await measure(server.url, 60 if long else 6, broken=False)
    for path in PROBES:
        probe = figures["probes"][path]
        record_property(f"{path} p99 in s", probe["p99_seconds"])
        assert probe["count"] >= 5
        assert probe["p99_seconds"] <= PROBE_CEILING_SECONDS[path], figures
