"""The comparison of fixed and adaptive shapes: what is compared, and with what."""

import json
import subprocess
import sys

import pytest

from benchmarks.adaptive import configurations, ratios


def test_baselines_are_fixed_and_the_rest_stands_apart() -> None:
    configs = configurations(greedy=True)
    assert [config.preset.name for config in configs if not config.adaptive] == [
        "target",
        "speculative-1x1",
        "speculative-2x1",
        "speculative-4x1",
        "mmtad-4x4",
    ]
    assert [config.method for config in configs if config.adaptive] == ["speculative", "mmtad"]
    assert configs[-1].acceptance_threshold == 0.7


def row(method: str, preset: str, rate: float, cpu: float) -> dict[str, object]:
    return {"batch": 4, "method": method, "preset": preset, "tokens_per_s": rate, "cpu_ms_per_token": cpu}


def test_ratio_is_to_the_best_baseline_never_to_another_adaptive_row() -> None:
    rows = [
        row("target", "target", 100, 10),
        row("speculative", "speculative-1x1", 120, 8),
        row("mmtad", "mmtad-4x4", 200, 5),
        row("speculative", "adaptive", 180, 6),
        row("mmtad", "adaptive", 150, 7),
    ]
    (found,) = ratios(rows)
    assert (found["batch"], found["best"]) == (4, "speculative-1x1")
    assert found["speed"] == pytest.approx(150 / 120)
    assert found["cpu"] == pytest.approx(8 / 7)


def test_program_prints_one_document() -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.adaptive",
        "--pair",
        "T",
        "--batches",
        "2",
        "--max-tokens",
        "8",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    document = json.loads(done.stdout.splitlines()[-1])
    assert len(document["rows"]) == 7
    assert sum(document["rows"][-1]["shapes"].values()) > 0
    assert document["ratios"][0]["speed"] > 0
