"""The event loop answers in time while 32 streams run and broken requests arrive."""

import pytest

from benchmarks.loop_lag import measure
from tests.e2e.conftest import RunningServer

pytestmark = pytest.mark.slow

CEILING_SECONDS = 0.25  # of the bucket that holds ten times the goal
SCRAPE_CEILING_SECONDS = 1.0  # ten times the goal for /metrics


async def test_the_event_loop_stays_free(server: RunningServer, long: bool) -> None:
    figures = await measure(server.url, 60 if long else 12)
    assert figures["p99_seconds"] <= CEILING_SECONDS, figures
    answers = figures["answers"]
    assert answers["stream 200, events"] >= 32
    assert [answer for answer in answers if " 5" in answer] == []
    assert {"malformed 400", "mutated 400"} <= answers.keys()


async def test_metrics_answer_while_every_row_is_taken(server: RunningServer, long: bool) -> None:
    figures = await measure(server.url, 60 if long else 6, broken=False)
    assert figures["scrapes"] >= 10
    assert figures["scrape_p99_seconds"] <= SCRAPE_CEILING_SECONDS, figures
