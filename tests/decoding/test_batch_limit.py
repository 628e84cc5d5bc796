"""How much shares a pass after memory ran out."""

import pytest

from decoding.batch_limit import EASE_SECONDS, BatchLimit


def test_a_failure_halves_what_failed() -> None:
    limit = BatchLimit(16)
    limit.halve(10, 0.0)
    assert limit.size == 5
    limit.halve(5, 0.0)
    limit.halve(2, 0.0)
    limit.halve(1, 0.0)
    assert limit.size == 1


def test_a_small_batch_that_failed_does_not_raise_the_limit() -> None:
    limit = BatchLimit(16)
    limit.halve(4, 0.0)
    limit.halve(16, 0.0)
    assert limit.size == 1


def test_time_without_a_failure_doubles_it_up_to_what_it_was() -> None:
    limit = BatchLimit(6)
    assert not limit.ease(1e9)
    limit.halve(6, 100.0)
    assert not limit.ease(100.0 + EASE_SECONDS - 1)
    assert limit.ease(100.0 + EASE_SECONDS)
    assert limit.size == 6
    limit.halve(6, 200.0)
    limit.halve(3, 200.0)
    assert limit.ease(300.0)
    assert limit.size == 2
    assert not limit.ease(300.0 + EASE_SECONDS - 1)


def test_it_is_lifted_at_once_when_its_cause_is_gone() -> None:
    limit = BatchLimit(8)
    limit.halve(2, 0.0)
    limit.lift()
    assert limit.size == 8


@pytest.mark.parametrize("most", [1, 2, 3, 5, 7, 8])
def test_parts_cover_the_group_and_fit_the_limit(most: int) -> None:
    rows = slice(3, 10)
    parts = BatchLimit(most).split(rows)
    sizes = [part.stop - part.start for part in parts]
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(3, 10))
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
