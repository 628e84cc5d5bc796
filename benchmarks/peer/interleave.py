"""Contestants take turns over the same requests, so that a busy machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.speed import spread

Texts = list[list[int]]


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to run the requests.

    `group` names what is compared (`target`, `speculative`), `ours` whose it is, `run` generates for all
    prompts and gives the new token ids of each. `notes` go into the row as they are.
    """

    name: str
    group: str
    ours: bool
    version: str
    dtype: str
    run: Callable[[Texts], Texts]
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Turns:
    """What one contestant's turns gave: wall and CPU seconds, tokens, and the texts of the last one."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    texts: Texts = field(default_factory=list)

    def rates(self, seconds: list[float]) -> list[float]:
        return [tokens / spent for tokens, spent in zip(self.tokens, seconds, strict=True)]


def take_turns(
    contestants: list[Contestant],
    prompts: Texts,
    repeats: int,
    seconds: float,
    progress: Callable[[str], None],
) -> list[Turns]:
    """Every contestant once per repeat, after a first round that only warms up.

    No round begins after `seconds`, but one is always measured.
    """
    deadline = time.monotonic() + seconds
    turns = [Turns() for _ in contestants]
    for contestant in contestants:
        contestant.run(prompts)
    for repeat in range(repeats):
        for contestant, each in zip(contestants, turns, strict=True):
            started, cpu_started = time.perf_counter(), time.process_time()
            each.texts = contestant.run(prompts)
            each.seconds.append(time.perf_counter() - started)
            each.cpu_seconds.append(time.process_time() - cpu_started)
            each.tokens.append(sum(map(len, each.texts)))
        progress(f"round {repeat + 1}/{repeats} of {len(contestants)} contestants")
        if time.monotonic() > deadline:
            break
    return turns


def rows(contestants: list[Contestant], turns: list[Turns]) -> list[dict[str, Any]]:
    """One row per contestant: medians over the turns; `spread` is their range over the median.

    `same_tokens` is the share of tokens that are those of the first contestant up to the first difference.
    """
    reference = turns[0].texts
    found = []
    for contestant, each in zip(contestants, turns, strict=True):
        rates, cpu_rates = each.rates(each.seconds), each.rates(each.cpu_seconds)
        found.append(
            {
                "name": contestant.name,
                "group": contestant.group,
                "ours": contestant.ours,
                "version": contestant.version,
                "dtype": contestant.dtype,
                "tokens_per_s": statistics.median(rates),
                "spread": spread(rates),
                "cpu_ms_per_token": 1e3 / statistics.median(cpu_rates),
                "tokens": each.tokens[-1],
                "same_tokens": same_tokens(reference, each.texts),
                "repeats": len(rates),
                **contestant.notes,
            }
        )
    return found


def same_tokens(reference: Texts, texts: Texts) -> float:
    """The share of `reference` that `texts` repeat before they differ for the first time."""
    common = 0
    for expected, got in zip(reference, texts, strict=True):
        pairs = zip(expected, got, strict=False)
        common += next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(got)))
    return common / sum(map(len, reference))


def ratios(found: list[dict[str, Any]], goals: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """Per group the best of ours over the best of theirs in each type of numbers, with the goal if any."""
    results = []
    for group, goal in goals.items():
        rows_of_group = [row for row in found if row["group"] == group]
        ours = [row for row in rows_of_group if row["ours"]]
        theirs = [row for row in rows_of_group if not row["ours"]]
        for dtype in dict.fromkeys(row["dtype"] for row in theirs if ours):
            rivals = [row for row in theirs if row["dtype"] == dtype]
            best, rival = (max(each, key=lambda row: row["tokens_per_s"]) for each in (ours, rivals))
            cheap, frugal = (min(each, key=lambda row: row["cpu_ms_per_token"]) for each in (ours, rivals))
            ratio = best["tokens_per_s"] / rival["tokens_per_s"]
            results.append(
                {
                    "group": group,
                    "ours": best["name"],
                    "theirs": f"{rival['name']}, {dtype}",
                    "ratio": ratio,
                    "cpu_ratio": frugal["cpu_ms_per_token"] / cheap["cpu_ms_per_token"],
                    "goal": goal,
                    "met": None if goal is None else ratio >= goal,
                }
            )
    return results
