"""Whose turn it is: groups, and the parts of one that memory cannot hold at once."""

from decoding.batch_limit import BatchLimit
from decoding.config import DecodingConfig
from decoding.turns import GroupTurns

ONE = DecodingConfig(method="target").preset
OTHER = DecodingConfig(method="mmtad").preset


def test_nobody_there() -> None:
    assert GroupTurns(BatchLimit(4)).next([]) is None


def test_every_part_has_its_turn() -> None:
    limit = BatchLimit(8)
    limit.halve(4, 0.0)
    turns = GroupTurns(limit)
    groups = [(ONE, slice(0, 4)), (OTHER, slice(4, 6))]
    seen = [turns.next(groups) for _ in range(6)]
    assert seen[:3] == seen[3:]
    parts = [(ONE, 0), slice(0, 2)], [(ONE, 1), slice(2, 4)], [(OTHER, 0), slice(4, 6)]
    assert [list(each) for each in seen[:3] if each is not None] == [list(part) for part in parts]


def test_who_left_is_forgotten_and_new_ones_are_first() -> None:
    turns = GroupTurns(BatchLimit(8))
    turns.next([(ONE, slice(0, 1))])
    assert turns.next([(ONE, slice(0, 1)), (OTHER, slice(1, 2))]) == ((OTHER, 0), slice(1, 2))
    turns.next([(ONE, slice(0, 1))])
    assert list(turns._last_turn) == [(ONE, 0)]
