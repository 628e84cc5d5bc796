"""Joules of a real server on a replayed counter: in the body, in the exposition, and absent without one."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import RunningServer, Start, until
from tests.e2e.test_serving import complete

pytestmark = pytest.mark.slow

WATTS = 40


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty seconds of `WATTS`, a reading every 10 ms."""
    path = tmp_path_factory.mktemp("energy") / "counter.jsonl"
    rows = [{"seconds": n / 100, "microjoules": {"cpu:0": n * WATTS * 10_000}} for n in range(2001)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def metered(start: Start, recording: Path) -> Iterator[RunningServer]:
    with start("--energy-source", f"replay:{recording}") as running:
        yield running


def energies(server: RunningServer, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [complete(server, ignore_eos=True, **fields)["metrics"]["energy"] for fields in requests]


def totals(server: RunningServer) -> dict[str, float]:
    """Every counter of joules in one scrape, summed over its labels."""
    found: Counter[str] = Counter()
    with server.client() as client:
        for family in text_string_to_metric_families(client.get("/metrics").text):
            for sample in family.samples:
                if sample.name.endswith("_joules_total"):
                    found[sample.name.removeprefix("mmtad_").removesuffix("_joules_total")] += sample.value
    return dict(found)


def test_joules_are_in_the_body_and_reconcile_with_the_exposition(metered: RunningServer) -> None:
    methods = ("target", "speculative", "mtad", "mmtad")
    used = energies(metered, [{"max_tokens": 200, "speculative": {"method": m}} for m in methods])
    for each in used:
        assert (each["source"], each["devices"]) == ("replay", ["cpu:0"])
        assert each["joules"] > 0
        assert each["joules_per_output_token"] == pytest.approx(each["joules"] / 200, rel=0.06)
        assert 0 <= each["prefill_joules"] < each["joules"]
    until(lambda: totals(metered).get("request_energy", 0) >= 0.999 * sum(each["joules"] for each in used))
    for method in methods:
        assert metered.metric("mmtad_request_energy_joules_total", method=method) > 0
    counted = totals(metered)
    assert counted["energy"] == pytest.approx(counted["request_energy"] + counted["idle_energy"], rel=1e-9)
    assert metered.metric("mmtad_energy_available") == 1
    assert metered.metric("mmtad_energy_per_request_joules_count") == len(methods)


def test_idle_time_is_counted_while_nothing_runs(metered: RunningServer) -> None:
    before = metered.metric("mmtad_idle_energy_joules_total")
    until(lambda: metered.metric("mmtad_idle_energy_joules_total") > before + WATTS / 2)


def test_without_a_counter_every_joule_is_absent(server: RunningServer) -> None:
    assert energies(server, [{"max_tokens": 8}]) == [None]
    assert totals(server) == {}
    assert server.metric("mmtad_energy_available") == 0


def test_a_recording_that_cannot_be_played_is_refused(start: Start, tmp_path: Path) -> None:
    with start("--energy-source", f"replay:{tmp_path / 'none'}", wait=False) as refused:
        assert refused.process.wait(60) == 2
    assert "--energy-source" in refused.log.read_text()


def test_a_sensor_that_is_lost_leaves_a_gap(start: Start, tmp_path: Path) -> None:
    """Three seconds with readings, six without, again and again."""
    path = tmp_path / "gaps.jsonl"
    readings = {n: {"cpu:0": n * WATTS * 100_000} for n in (*range(30), 90)}
    rows = [{"seconds": n / 10, "microjoules": readings.get(n)} for n in range(91)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with start("--energy-source", f"replay:{path}") as server:
        for available in (1, 0):
            until(lambda available=available: server.metric("mmtad_energy_available") == available)
        lost = totals(server)
        assert energies(server, [{"max_tokens": 8}]) == [None]
        assert server.metric("mmtad_energy_available") == 0
        assert totals(server) == lost, "nothing is made up for what was not read"
        until(lambda: server.metric("mmtad_energy_available") == 1)
        until(lambda: totals(server)["energy"] > lost["energy"])
        assert server.metric("mmtad_worker_up") == 1
        counted = totals(server)
        found = counted.get("request_energy", 0) + counted["idle_energy"]
        assert counted["energy"] == pytest.approx(found, rel=1e-9)
