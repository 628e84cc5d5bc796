"""Turns of contestants: what a row says of them, and who is compared with whom."""

from typing import Any

import pytest

from benchmarks.peer.interleave import Contestant, Texts, ratios, rows, same_tokens, take_turns


def test_every_contestant_takes_its_turn_over_the_same_prompts() -> None:
    asked: list[tuple[str, Texts]] = []

    def contestant(name: str, answer: list[int], *, ours: bool) -> Contestant:
        def run(prompts: Texts) -> Texts:
            asked.append((name, prompts))
            return [answer for _ in prompts]

        return Contestant(name, "target", ours, "1.0", "float32", run, {"batch": 1})

    both = [contestant("a", [1, 2, 3, 4], ours=True), contestant("b", [1, 2, 9, 4], ours=False)]
    said: list[str] = []
    found = rows(both, take_turns(both, [[7], [8]], 2, 60.0, said.append))
    assert asked == [("a", [[7], [8]]), ("b", [[7], [8]])] * 3
    assert [row["same_tokens"] for row in found] == [1.0, 0.5]
    assert all(row["tokens"] == 8 and row["repeats"] == 2 and row["batch"] == 1 for row in found)
    assert len(said) == 2
    (out_of_time,) = rows(both[:1], take_turns(both[:1], [[7]], 9, 0.0, said.append))
    assert out_of_time["repeats"] == 1


def test_tokens_are_the_same_up_to_the_first_difference() -> None:
    assert same_tokens([[1, 2], [3, 4]], [[1, 2], [9, 4]]) == 0.5
    assert same_tokens([[1, 2, 3, 4]], [[1]]) == 0.25


def row(name: str, speed: float, cpu: float, *, ours: bool) -> dict[str, Any]:
    return {
        "name": name,
        "group": "target",
        "ours": ours,
        "dtype": "float32",
        "tokens_per_s": speed,
        "cpu_ms_per_token": cpu,
    }


def test_the_best_of_each_side_is_compared() -> None:
    found = [row("slow", 10, 90, ours=True), row("fast", 30, 30, ours=True), row("plain", 12, 80, ours=False)]
    found.append(row("tuned", 20, 45, ours=False))
    found.append({**row("halved", 60, 15, ours=False), "dtype": "bfloat16"})
    ratio, halved = ratios(found, {"target": 1.3, "absent": 1.0})
    assert (ratio["ours"], ratio["theirs"], ratio["met"]) == ("fast", "tuned, float32", True)
    assert (ratio["ratio"], ratio["cpu_ratio"]) == (pytest.approx(1.5), pytest.approx(1.5))
    assert (halved["theirs"], halved["ratio"], halved["met"]) == ("halved, bfloat16", 0.5, False)
    assert not ratios(found, {"target": 1.6})[0]["met"]
