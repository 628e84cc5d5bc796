"""Judge the texts of one configuration after another against those of the first."""

import math
from typing import Any

import numpy as np

from benchmarks.generation import Generation
from benchmarks.quality import bootstrap_interval, bootstrap_ratio, by_origin, paired_interval
from benchmarks.table import describe_texts
from benchmarks.tasks import Task


class Judge:
    """The texts that are judged first are the reference: those of `target`."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._log_probs: list[float] = []
        self._right: list[float] = []
        self.reference: list[Generation] = []

    def row(self, results: list[Generation]) -> dict[str, Any]:
        """Likelihood, perplexity ratio, repetition and, where there is one, the task's score."""
        log_probs = [float(np.mean(result.log_probs)) for result in results]
        right = [float(each) for each in self._task.grade(results)] if self._task.grade else []
        if not self.reference:
            self.reference, self._log_probs, self._right = results, log_probs, right
        difference, low, high = paired_interval(log_probs, self._log_probs)
        return {
            **describe_texts(results),
            "log_prob": float(np.mean(log_probs)),
            "difference": difference,
            "interval": [low, high],
            "ppl_ratio": math.exp(-difference),
            **_origins(results),
            **(self._score(right) if right else {}),
        }

    def _score(self, right: list[float]) -> dict[str, Any]:
        ratio, low, high = bootstrap_ratio(right, self._right)
        return {
            "right": float(np.mean(right)),
            "right_interval": list(bootstrap_interval(right)),
            "right_ratio": ratio,
            "ratio_interval": [low, high],
        }


def _origins(results: list[Generation]) -> dict[str, Any]:
    """Mean log-probability per token by origin, and the share of tokens that are the target's own."""
    accepted, own = by_origin(results)
    if not accepted:
        return {}
    return {
        "accepted_nats": float(np.mean(accepted)),
        "own_nats": float(np.mean(own)),
        "own_share": len(own) / (len(accepted) + len(own)),
    }
