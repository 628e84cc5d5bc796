"""From outcomes to the figures of one point: a method at one concurrency or one rate."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from benchmarks.load.client import Outcome

PERCENTILES = (50, 90, 99)
LATENCIES: dict[str, Callable[[Outcome], float | None]] = {
    "ttft": lambda outcome: outcome.to_first_token,
    "tpot": lambda outcome: outcome.per_output_token,
    "e2e": lambda outcome: outcome.seconds,
}


@dataclass(frozen=True, slots=True)
class Objective:
    """A request is good when it meets both, in seconds."""

    ttft: float
    tpot: float

    def met(self, outcome: Outcome) -> bool:
        first, each = outcome.to_first_token, outcome.per_output_token
        return first is not None and first <= self.ttft and (each is None or each <= self.tpot)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a point; `cpu_seconds` are those of the server's processes while it lasted."""

    outcomes: list[Outcome]
    cpu_seconds: float | None = None

    @property
    def seconds(self) -> float:
        return max(each.ended for each in self.outcomes) - min(each.due for each in self.outcomes)

    @property
    def served(self) -> list[Outcome]:
        return [each for each in self.outcomes if each.error is None]

    @property
    def tokens(self) -> int:
        return sum(each.tokens for each in self.served)


def summarise(runs: Sequence[Run], objective: Objective) -> dict[str, Any]:
    """The figures of one point; what was not measured is absent.

    Rates are the median of the runs, with their range where there are several; latencies are those of
    all requests that were served; percentiles are interpolated linearly.
    """
    served = [outcome for run in runs for outcome in run.served]
    speeds = [run.tokens / run.seconds for run in runs]
    failures = [each.error for run in runs for each in run.outcomes if each.error is not None]
    point: dict[str, Any] = {
        "requests": sum(len(run.outcomes) for run in runs),
        "errors": dict(Counter(failures)),
        "tokens": sum(run.tokens for run in runs),
        "seconds": sum(run.seconds for run in runs),
        "tokens_per_second": median(speeds),
        "requests_per_second": median(len(run.served) / run.seconds for run in runs),
        "goodput": median(sum(map(objective.met, run.served)) / run.seconds for run in runs),
        "good_share": sum(map(objective.met, served)) / sum(len(run.outcomes) for run in runs),
    }
    if len(runs) > 1:
        point |= {"repeats": len(runs), "tokens_per_second_range": [min(speeds), max(speeds)]}
    samples = {name: _known(map(take, served)) for name, take in LATENCIES.items()}
    point |= {name: percentiles(values) for name, values in samples.items() if values}
    point["samples"] = {name: [round(value, 5) for value in values] for name, values in samples.items()}
    return point | _cost(runs, point["tokens"]) | _reported(served)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{each}": float(np.percentile(values, each)) for each in PERCENTILES}


def _cost(runs: Sequence[Run], tokens: int) -> dict[str, float]:
    """Joules where the server reports them for every request, else CPU time where it can be seen."""
    if not tokens:
        return {}
    energies = [(each.metrics or {}).get("energy") for run in runs for each in run.served]
    joules = _known(energy and energy.get("joules") for energy in energies)
    if len(joules) == len(energies):
        return {"joules_per_token": sum(joules) / tokens}
    cpu = _known(run.cpu_seconds for run in runs)
    return {"cpu_seconds_per_token": sum(cpu) / tokens} if len(cpu) == len(runs) else {}


def _reported(served: Iterable[Outcome]) -> dict[str, Any]:
    """What this server says of its own decoding; other servers leave it out."""
    reports = [(each.metrics, each.tokens) for each in served if each.metrics]
    log_probs = [(report.get("target_logprob_mean"), tokens) for report, tokens in reports if tokens]
    shown: dict[str, Any] = {}
    if log_probs and all(value is not None for value, _ in log_probs):
        total = sum(tokens for _, tokens in log_probs)
        shown["target_logprob_mean"] = sum(value * tokens for value, tokens in log_probs if value) / total
    steps = [report.get("speculative_decoding") or {} for report, _ in reports]
    histograms = [each["acceptance_histogram"] for each in steps if "acceptance_histogram" in each]
    counts = np.zeros(max(map(len, histograms), default=0))
    for histogram in histograms:
        counts[: len(histogram)] += histogram
    if counts.sum():
        reached = counts[::-1].cumsum()[::-1] / counts.sum()
        shown["accepted_by_depth"] = [round(float(share), 4) for share in reached[1:]]
        shown["mean_acceptance_length"] = 1 + float(reached[1:].sum())
    return shown


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
