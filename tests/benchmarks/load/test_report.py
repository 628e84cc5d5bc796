"""The report stands alone and shows what was measured; two results are compared by their points."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load.client import Outcome
from benchmarks.load.compare import compare
from benchmarks.load.report import columns, report, write_load_plots
from benchmarks.load.summary import Objective, Run, summarise


class Balance(HTMLParser):
    """Whether every element that opens is closed, and the text of the document."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_data(self, data: str) -> None:
        self.text += data


def point(method: str, mode: str, level: float, tokens: int = 5, **metrics: Any) -> dict[str, Any]:
    outcome = Outcome(due=0.0, first=0.5, ended=2.5, tokens=tokens, metrics=metrics or None)
    load: dict[str, Any] = {"concurrency": level} if mode == "closed" else {"share_of_capacity": level}
    return {
        "method": method,
        "mode": mode,
        **load,
        **summarise([Run([outcome] * 3, 0.3)], Objective(1.0, 1.0)),
    }


def result(points: list[dict[str, Any]], **conditions: Any) -> dict[str, Any]:
    return {
        "conditions": {"model": "<b>model", "max_tokens": 16, **conditions},
        "objective": {"ttft": 1.0, "tpot": 0.2},
        "points": points,
    }


ACCEPTED = {"speculative_decoding": {"acceptance_histogram": [1, 2, 3]}}
POINTS = [
    point("target", "closed", 1),
    point("mmtad", "closed", 1, **ACCEPTED),
    point("target", "closed", 8),
    point("mmtad", "open", 0.7),
]


def test_the_report_is_one_file_with_everything() -> None:
    text = report(result(POINTS))
    document = Balance()
    document.feed(text)
    assert document.open == []
    assert "<b>model" in document.text
    for words in (
        "concurrency 8",
        "0.7 of capacity",
        "Acceptance by depth",
        "within 1 s, then at most 0.2 s",
    ):
        assert words in document.text
    assert text.count("<svg ") == 5
    assert not re.search(r"<(script|link|img)\b", text)
    outside = {link for link in re.findall(r'(?:href|src)="([^"]+)"', text) if not link.startswith("#")}
    assert outside == set()


def test_what_was_not_measured_is_not_drawn() -> None:
    text = report(result([point("server", "open", 1.0)]))
    assert "Acceptance by depth" not in text
    assert "Load and cost" not in text


def test_a_comparison_is_of_equal_points() -> None:
    faster = result([point("target", "closed", 1, tokens=10), POINTS[3]], max_tokens=32)
    compared = compare(result(POINTS), faster)
    assert compared["differences"] == {"max_tokens": [16, 32]}
    first, second = compared["ratios"]
    assert (first["method"], first["load"]) == ("target", "concurrency 1")
    assert first["tokens_per_second"] == 2
    assert first["tpot_p50"] == pytest.approx(4 / 9)
    assert first["cpu_seconds_per_token"] == 0.5
    assert second["e2e_p99"] == 1


def test_repeats_are_shown_with_their_range() -> None:
    outcome = Outcome(due=0.0, first=0.5, ended=2.5, tokens=5)
    slower = Outcome(due=0.0, first=0.5, ended=5.0, tokens=5)
    repeated = summarise([Run([outcome]), Run([slower])], Objective(1.0, 1.0))
    load = {"method": "target", "mode": "closed", "concurrency": 1}
    assert columns({**load, **repeated})["range"] == "1.0 to 2.0"
    assert columns(POINTS[0])["range"] == "-"


def test_plots_are_written_as_an_image(tmp_path: Path) -> None:
    write_load_plots(POINTS, tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="give --concurrency"):
        write_load_plots(POINTS[-1:], tmp_path / "none.png")


def test_results_without_a_common_point_are_refused() -> None:
    with pytest.raises(ValueError, match="no method and load in common"):
        compare(result(POINTS[:1]), result(POINTS[1:]))
