"""Figures of texts: intervals, repetition, survival."""

import pytest

from benchmarks.generation import Generation
from benchmarks.quality import (
    bootstrap_interval,
    bootstrap_ratio,
    by_origin,
    distinct,
    longest_repeat,
    paired_interval,
    survival,
)


def test_interval_is_of_the_paired_differences() -> None:
    assert paired_interval([1.0, 2.0, 4.0], [0.0, 1.0, 3.0]) == (1.0, 1.0, 1.0)
    mean, _, high = paired_interval([1.0, 3.0], [0.0, 0.0])
    assert mean == 2.0
    assert high - mean == pytest.approx(1.96)


def test_bootstrap_is_seeded_and_pairs_prompts() -> None:
    values, reference = [1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0]
    assert bootstrap_ratio(reference * 20, reference * 20) == (1, 1, 1)
    ratio, low, high = bootstrap_ratio(values * 20, reference * 20)
    assert ratio == 1.5
    assert 1.2 < low < 1.5 < high < 2
    assert bootstrap_interval(values * 20) == bootstrap_interval(values * 20)
    low, high = bootstrap_interval(values * 20)
    assert 0.6 < low < 0.75 < high < 0.9


def test_a_ratio_to_nothing_is_not_a_number() -> None:
    assert all(value != value for value in bootstrap_ratio([1.0], [0.0]))


@pytest.mark.parametrize(
    ("token_ids", "share", "repeat"),
    [
        ([1, 2, 3, 4], 1.0, 0),
        ([1, 1, 1, 1], 0.5, 3),
        ([1, 2, 3, 9, 1, 2, 3], 0.8, 3),
        ([1, 2], 1.0, 0),
        ([], 1.0, 0),
    ],
)
def test_repetition(token_ids: list[int], share: float, repeat: int) -> None:
    assert distinct(token_ids) == pytest.approx(share)
    assert longest_repeat(token_ids) == repeat


def test_survival_counts_only_steps_that_went_so_deep() -> None:
    assert survival([2, 0, 1], [2, 2, 1]) == pytest.approx([2 / 3, 1 / 2])
    assert survival([], []) == []


def test_tokens_are_told_apart_by_their_origin() -> None:
    """Steps of two accepted and one own, none and one, and a last one that the end cut to one accepted."""
    cut = Generation([1] * 5, [-1.0, -2.0, -9.0, -8.0, -3.0], num_steps=3, accepted=[2, 0, 2])
    assert by_origin([cut, Generation([1], [-7.0], num_steps=1, accepted=[0])]) == (
        [-1.0, -2.0, -3.0],
        [-9.0, -8.0, -7.0],
    )
