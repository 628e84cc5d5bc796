"""The gate: what it refuses, and that the engine passes it. The slowest test here, 40 seconds of CPU time."""

from typing import Any

import pytest

from benchmarks import gate


def rows(concurrency: int, **rates: float) -> list[dict[str, Any]]:
    return [
        {"method": method, "concurrency": concurrency, "tokens_per_cpu_s": rate, "host_share": 0.1}
        for method, rate in ({**rates, "mmtad, adaptive": rates["mmtad"]}).items()
    ]


@pytest.mark.parametrize(
    ("target", "speculative", "mmtad", "best"),
    [(10.0, 20.0, 18.1, None), (10.0, 20.0, 17.0, "speculative"), (20.0, 10.0, 17.0, "target")],
)
def test_the_best_baseline_of_each_concurrency_is_the_measure(
    target: float, speculative: float, mmtad: float, best: str | None
) -> None:
    fine = rows(1, target=1.0, speculative=2.0, mmtad=2.0)
    found = list(gate.failures(fine + rows(4, target=target, speculative=speculative, mmtad=mmtad)))
    assert len(found) == (best is not None)
    assert all(
        f"mmtad, adaptive at concurrency 4 gives 0.85 of the tokens of {best}" in each for each in found
    )


def test_time_beside_the_passes_is_bounded() -> None:
    slow = rows(1, target=1.0, speculative=2.0, mmtad=2.0)
    slow[1]["host_share"], slow[3]["host_share"] = 0.3, None
    assert list(gate.failures(slow)) == [
        "speculative at concurrency 1 spends 0.30 of a step beside its passes, more than 0.25"
    ]
    passes = {("target", 1): 0.03}
    assert gate.host_share(gate.configurations()[0], passes, [0.04, 0.04, 0.2]) == pytest.approx(0.25)


@pytest.mark.alone
@pytest.mark.slow
def test_the_engine_passes_the_gate() -> None:
    document = gate.run(rounds=5, num_prompts=4, tokens=64)
    assert {row["concurrency"] for row in document["rows"]} == {1, 4}
    assert document["failures"] == [], document
