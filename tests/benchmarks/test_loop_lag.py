"""The figures that the program reads off a histogram, and its bodies."""

import json
import math
import random

import pytest

from benchmarks.loop_lag import MEBIBYTE, huge, malformed, mutated, percentile, quantile


def test_a_percentile_is_the_bound_of_its_bucket() -> None:
    buckets = {0.001: 90.0, 0.01: 99.0, 0.1: 100.0, math.inf: 100.0}
    assert [percentile(buckets, share) for share in (0.5, 0.9, 0.99, 0.995, 1.0)] == [
        0.001,
        0.001,
        0.01,
        0.1,
        0.1,
    ]


def test_a_quantile_is_one_of_the_values() -> None:
    values = [float(value) for value in range(200, 0, -1)]
    assert [quantile(values, share) for share in (0.005, 0.5, 0.99, 1.0)] == [1, 100, 198, 200]
    assert quantile([3.0], 0.99) == 3


def test_huge_bodies_are_at_the_limit_and_beyond() -> None:
    rng = random.Random(0)
    sizes = {len(huge(rng, "tiny")) for _ in range(20)}
    assert len(sizes) == 2
    assert max(sizes) - min(sizes) == 2
    assert abs(min(sizes) - MEBIBYTE) <= 2


@pytest.mark.parametrize("bodies", [malformed, mutated])
def test_broken_bodies_are_broken_and_reproducible(bodies: object) -> None:
    assert callable(bodies)
    first, second = random.Random(1), random.Random(1)
    drawn = [bodies(first, "tiny") for _ in range(50)]
    assert drawn == [bodies(second, "tiny") for _ in range(50)]

    def is_json(body: bytes) -> bool:
        try:
            json.loads(body)
        except (ValueError, RecursionError):
            return False
        return True

    assert not all(map(is_json, drawn))
