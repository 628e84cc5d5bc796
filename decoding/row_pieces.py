"""Rows of one pass, cut where their lengths differ much: attention then reads little more than there is."""

import functools

PIECE_BYTES = 256 * 1024  # of keys and values, which take as long to read as one more piece does
Piece = tuple[slice, int]  # rows of the pass, columns that they see


@functools.lru_cache(maxsize=256)
def cheapest_pieces(lives: tuple[int, ...], column_bytes: int) -> tuple[Piece, ...]:
    """The pieces, in order, that cost least; `lives` are the columns that each row of the pass sees.

    A piece reads as many columns for each of its rows as its longest row has.
    """
    best: list[tuple[float, tuple[Piece, ...]]] = [(0.0, ())]
    for end in range(1, len(lives) + 1):
        longest, found = 0, []
        for first in reversed(range(end)):
            longest = max(longest, lives[first])
            cost = best[first][0] + PIECE_BYTES + (end - first) * longest * column_bytes
            found.append((cost, first, longest))
        cost, first, longest = min(found)
        best.append((cost, (*best[first][1], (slice(first, end), longest))))
    return best[-1][1]
