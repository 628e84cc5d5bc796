"""The sweep covers its grid once, judges first and times last, and measures only what is missing."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import sweep


def test_grid_holds_every_configuration_once() -> None:
    found = list(sweep.grid(sweep.parse_arguments([])))
    assert len(found) == len(set(found)) == 3 * 4 * 5 * 2
    assert {config.acceptance_reference for config in found} == {"target", "draft"}


SMALL = ("--depths", "2", "--widths", "2", "--thresholds", "0.5", "--temperatures", "1", "--repeats", "1")


@pytest.mark.slow
def test_a_second_run_measures_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "lines.jsonl"
    command = ["sweep", "--out", str(out), "--prompts", "2", "--max-tokens", "8", "--timed-prompts", "1"]
    command += SMALL

    def rows(*more: str) -> list[dict[str, Any]]:
        monkeypatch.setattr("sys.argv", [*command, *more])
        sweep.main()
        return [json.loads(text) for text in out.read_text(encoding="utf-8").splitlines()]

    judged = rows("--no-timed")
    assert len(judged) == 4 + 3 + 2
    assert not any("timed" in row for row in judged)
    everything = rows()
    assert everything[: len(judged)] == judged
    timed = everything[len(judged) :]
    assert [row["method"] for row in timed] == ["target", "spec. block", "multi 4x1", "mmtad"]
    assert all(row["timed"] and row["step_cost"] > 0 for row in timed)
    assert rows() == everything
