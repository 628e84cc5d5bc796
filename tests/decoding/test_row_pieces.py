"""Rows are cut where that costs least, by comparison with every way to cut them."""

import itertools
import random

import pytest

from decoding.row_pieces import PIECE_BYTES, Piece, cheapest_pieces

COLUMN = 1024  # bytes


def cost(pieces: tuple[Piece, ...]) -> int:
    return sum(PIECE_BYTES + (rows.stop - rows.start) * live * COLUMN for rows, live in pieces)


def all_cuts(lives: tuple[int, ...]) -> list[tuple[Piece, ...]]:
    places = range(1, len(lives))
    cuts = [cut for number in range(len(lives)) for cut in itertools.combinations(places, number)]
    ends = [(0, *cut, len(lives)) for cut in cuts]
    return [tuple((slice(i, j), max(lives[i:j])) for i, j in itertools.pairwise(each)) for each in ends]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cut_costs_less(seed: int) -> None:
    rng = random.Random(seed)
    lives = tuple(64 * rng.choice([1, 2, 3, 8, 40]) for _ in range(rng.randint(1, 8)))
    pieces = cheapest_pieces(lives, COLUMN)
    assert pieces in all_cuts(lives)
    assert cost(pieces) == min(map(cost, all_cuts(lives)))


def test_rows_of_like_length_stay_together() -> None:
    assert cheapest_pieces((64, 128, 64, 128), COLUMN) == ((slice(0, 4), 128),)


def test_a_long_row_attends_alone() -> None:
    assert cheapest_pieces((64, 64, 4096, 128), COLUMN) == (
        (slice(0, 2), 64),
        (slice(2, 3), 4096),
        (slice(3, 4), 128),
    )
