"""Two results of `benchmarks.serve` side by side: what the second is, as a multiple of the first."""

from collections.abc import Iterator
from typing import Any

from benchmarks.load.report import Point, describe_load

FIGURES = ("tokens_per_second", "requests_per_second", "goodput", "joules_per_token", "cpu_seconds_per_token")
LATENCIES = ("ttft", "tpot", "e2e")
PERCENTILES = ("p50", "p99")
SETTINGS = ("model", "workload", "max_tokens", "temperature", "ignore_eos", "cores", "server_cores")


def compare(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Ratios of every point that both have, and the conditions in which they differ.

    Raises ValueError when they have no point in common.
    """
    ours = {_key(point): point for point in first["points"]}
    pairs = [(ours[_key(point)], point) for point in second["points"] if _key(point) in ours]
    if not pairs:
        raise ValueError("the two results have no method and load in common")
    conditions = first["conditions"], second["conditions"]
    return {
        "differences": {
            name: [each.get(name) for each in conditions]
            for name in SETTINGS
            if conditions[0].get(name) != conditions[1].get(name)
        },
        "ratios": [
            {"load": describe_load(one), "method": one["method"], **dict(_ratios(one, two))}
            for one, two in pairs
        ],
    }


def _key(point: Point) -> tuple[str, str]:
    return describe_load(point), point["method"]


def _ratios(one: Point, two: Point) -> Iterator[tuple[str, float]]:
    for name in FIGURES:
        if one.get(name) and name in two:
            yield name, two[name] / one[name]
    for name in LATENCIES:
        for percentile in PERCENTILES:
            if one.get(name, {}).get(percentile) and name in two:
                yield f"{name}_{percentile}", two[name][percentile] / one[name][percentile]
