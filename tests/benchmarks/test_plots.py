"""Plots keep the rows that nothing beats, and are written from any lines."""

import json
from pathlib import Path

import pytest

from benchmarks import plots

ROWS = [
    {"method": "target", "BE": 1.0, "right": 0.6, "difference": 0.0},
    {"method": "spec. block", "BE": 2.5, "right": 0.6, "difference": 0.0},
    {"method": "greedy", "BE": 1.0, "right": 0.9, "difference": 0.2},
    {"method": "mmtad", "reference": "target", "BE": 2.0, "right": 0.8, "difference": 0.1},
    {"method": "mmtad", "reference": "target", "BE": 3.0, "right": 0.7, "difference": 0.05},
    {"method": "mmtad", "reference": "target", "BE": 2.5, "right": 0.6, "difference": 0.04},
]

TIMED = {"timed": True, "method": "mmtad", "depth": 4, "width": 2, "step_cost": 1.25}
PLAIN = {"timed": True, "method": "target", "depth": None, "width": None, "step_cost": 0.9}


def test_speed_is_block_efficiency_over_the_cost_of_a_step(tmp_path: Path) -> None:
    rows = [{**ROWS[3], "depth": 4, "width": 2}, {**ROWS[4], "depth": 8, "width": 2}, TIMED, PLAIN]
    path = tmp_path / "sweep.jsonl"
    path.write_text("\n".join(json.dumps({**row, "T": 1.0, "pair": "T"}) for row in rows), encoding="utf-8")
    timed, untimed = plots.read(path)
    assert timed["S"] == pytest.approx(2.0 * 0.9 / 1.25)
    assert "S" not in untimed


def test_frontier_drops_what_another_row_beats() -> None:
    best = plots.frontier([row for row in ROWS if row["method"] == "mmtad"], "BE", "right")
    assert [(row["BE"], row["right"]) for row in best] == [(2.0, 0.8), (3.0, 0.7)]


def test_pictures_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({**row, "T": 1.0, "pair": "T", "prompts": 4}) for row in [*ROWS, TIMED, PLAIN]]
    (tmp_path / "sweep.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["plots", str(tmp_path / "sweep.jsonl"), "--out", str(tmp_path)])
    plots.main()
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "sweep-temperature-1-right.png",
        "sweep-temperature-1-difference.png",
    }
