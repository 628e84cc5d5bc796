"""Figures of what was written: likelihood, repetition, and intervals of differences and ratios."""

from collections.abc import Sequence

import numpy as np

from benchmarks.generation import Generation

RESAMPLES = 2000


def paired_interval(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference and its 95 % interval over prompts (normal approximation)."""
    differences = np.subtract(values, reference)
    half = 1.96 * differences.std(ddof=1) / np.sqrt(len(differences)) if len(differences) > 1 else np.nan
    mean = float(differences.mean())
    return mean, float(mean - half), float(mean + half)


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over prompts."""
    means = np.asarray(values)[_resampled(len(values), seed)].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def bootstrap_ratio(
    values: Sequence[float], reference: Sequence[float], seed: int = 0
) -> tuple[float, float, float]:
    """Ratio of the means and its 95 % bootstrap interval, prompts resampled in pairs."""
    index = _resampled(len(values), seed)
    numerators = np.asarray(values)[index].mean(1)
    denominators = np.asarray(reference)[index].mean(1)
    mean = float(np.mean(reference))
    if mean == 0:
        return float("nan"), float("nan"), float("nan")
    drawn = denominators > 0
    low, high = np.quantile(numerators[drawn] / denominators[drawn], (0.025, 0.975))
    return float(np.mean(values)) / mean, float(low), float(high)


def _resampled(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))


def distinct(token_ids: Sequence[int], size: int = 3) -> float:
    """Share of different ones among the runs of `size` tokens; 1 where there are none."""
    runs = [tuple(token_ids[start : start + size]) for start in range(len(token_ids) - size + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def longest_repeat(token_ids: Sequence[int]) -> int:
    """Tokens of the longest run that occurs at two places, which may overlap."""
    ids = list(token_ids)
    shared = [0] * (len(ids) + 1)
    longest = 0
    for end in range(1, len(ids) + 1):
        before = shared
        shared = [0] * (len(ids) + 1)
        for other in range(1, end):
            if ids[end - 1] == ids[other - 1]:
                shared[other] = before[other - 1] + 1
        longest = max(longest, *shared)
    return longest


def survival(accepted: Sequence[int], drafted: Sequence[int]) -> list[float]:
    """Share of the steps that proposed a depth in which it was accepted, for depth 1, 2, ..."""
    deepest = max(drafted, default=0)
    kept, offered = np.asarray(accepted), np.asarray(drafted)
    return [float((kept[offered >= depth] >= depth).mean()) for depth in range(1, deepest + 1)]


def by_origin(results: list[Generation]) -> tuple[list[float], list[float]]:
    """Log-probabilities of all tokens that were accepted from the draft, and of the target's own.

    A step delivers what it accepted and then one token of the target's own, cut at the end of the text.
    """
    accepted: list[float] = []
    own: list[float] = []
    for result in results:
        left = list(result.log_probs)
        for count in result.accepted:
            accepted += left[:count]
            own += left[count : count + 1]
            left = left[count + 1 :]
    return accepted, own
