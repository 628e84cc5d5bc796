"""The figures of a point, by hand."""

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.load.client import Outcome
from benchmarks.load.summary import Objective, Run, summarise

OBJECTIVE = Objective(ttft=1.0, tpot=0.5)
GOOD = Outcome(due=0.0, first=1.0, ended=3.0, tokens=5)
LATE = Outcome(due=1.0, first=4.0, ended=5.0, tokens=3)
FAILED = Outcome(due=2.0, ended=10.0, error="503 queue_full")


def report(**fields: Any) -> dict[str, Any]:
    return {"energy": None, "target_logprob_mean": None, "speculative_decoding": None, **fields}


def test_rates_and_latencies() -> None:
    point = summarise([Run([GOOD, LATE, FAILED])], OBJECTIVE)
    assert point["requests"] == 3
    assert point["errors"] == {"503 queue_full": 1}
    assert point["seconds"] == 10
    assert point["tokens_per_second"] == 0.8
    assert point["requests_per_second"] == 0.2
    assert point["goodput"] == 0.1
    assert point["good_share"] == pytest.approx(1 / 3)
    assert point["ttft"] == pytest.approx({"p50": 2.0, "p90": 2.8, "p99": 2.98})
    assert point["tpot"]["p50"] == 0.5
    assert point["e2e"]["p50"] == 3.5


def test_repeats_are_a_median_with_its_range() -> None:
    runs = [Run([replace(GOOD, ended=ended, tokens=8)]) for ended in (2.0, 4.0, 8.0)]
    point = summarise(runs, OBJECTIVE)
    assert point["tokens_per_second"] == 2
    assert point["tokens_per_second_range"] == [1, 4]
    assert point["repeats"] == 3


def test_nothing_measured_is_absent() -> None:
    point = summarise([Run([FAILED])], OBJECTIVE)
    assert point["tokens_per_second"] == 0
    absent = {"ttft", "tpot", "e2e", "joules_per_token", "cpu_seconds_per_token", "accepted_by_depth"}
    assert not absent & set(point)
    assert "cpu_seconds_per_token" not in summarise([Run([GOOD])], OBJECTIVE)
    assert summarise([Run([GOOD], cpu_seconds=2.0)], OBJECTIVE)["cpu_seconds_per_token"] == 0.4


def test_joules_count_where_every_request_has_them() -> None:
    measured = replace(GOOD, metrics=report(energy={"joules": 10.0}))
    point = summarise([Run([measured, measured], cpu_seconds=1.0)], OBJECTIVE)
    assert point["joules_per_token"] == 2
    assert "cpu_seconds_per_token" not in point
    lost = replace(GOOD, metrics=report())
    point = summarise([Run([measured, lost], cpu_seconds=1.0)], OBJECTIVE)
    assert "joules_per_token" not in point
    assert point["cpu_seconds_per_token"] == 0.1


def test_acceptance_and_quality_are_weighted() -> None:
    first = report(target_logprob_mean=-1.0, speculative_decoding={"acceptance_histogram": [1, 1, 0]})
    second = report(target_logprob_mean=-0.2, speculative_decoding={"acceptance_histogram": [0, 0, 2]})
    outcomes = [replace(GOOD, metrics=first), replace(LATE, metrics=second)]
    point = summarise([Run(outcomes)], OBJECTIVE)
    assert point["accepted_by_depth"] == [0.75, 0.5]
    assert point["mean_acceptance_length"] == 2.25
    assert point["target_logprob_mean"] == pytest.approx(-0.7)
