"""Rows stay gapless and grouped, and a sequence's cached columns travel with it."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding import Sequence
from decoding.prefix_cache import PrefixCache
from decoding.rows import RowTable
from tests.decoding.tiny import request

METHODS = ["target", "draft", "mmtad"]


class FakeCache:
    """Remembers which sequence's columns lie in which row."""

    def __init__(self, rows: int) -> None:
        self.rows, self.capacity = rows, 64
        self.lengths = [0] * rows
        self.content: list[Any] = [None] * rows

    def move_row(self, source: int, destination: int) -> None:
        self.content[destination] = self.content[source]
        self.lengths[destination] = self.lengths[source]

    def copy_row(self, source: int, destination: int, length: int) -> None:
        self.content[destination] = self.content[source]

    def clear_row(self, row: int, *, kept: int) -> None:
        self.lengths[row] = kept

    def check_integrity(self, lengths: list[int]) -> None:
        assert self.lengths[: len(lengths)] == lengths


def make_table(rows: int = 4) -> tuple[RowTable, list[FakeCache]]:
    caches = [FakeCache(rows + 1), FakeCache(rows + 1)]
    return RowTable(caches, rows, PrefixCache(caches, rows)), caches  # type: ignore[arg-type]


def insert(table: RowTable, caches: list[FakeCache], sequence: Sequence) -> None:
    table._prefixes.stage(sequence.prompt_ids[:-1], "", reuse=False)
    for cache in caches:
        cache.content[table.staging] = sequence.id
        cache.lengths[table.staging] = sequence.num_cached
    table.insert(sequence, table.staging)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(1, 5)), max_size=25))
def test_rows_stay_grouped_and_keep_their_columns(actions: list[tuple[bool, int, int]]) -> None:
    """Guards a row copied over one that is still needed, and a length left behind.

    Rows that were left may be copied from: what they are said to hold is what they hold.
    """
    table, caches = make_table()
    for number, (joins, which, length) in enumerate(actions):
        if joins and table.num_free:
            insert(table, caches, request(str(number), [number] * length, METHODS[which % 3]))
            table.set_lengths(slice(0, len(table)))
        elif len(table):
            removed = table.sequences[which % len(table)]
            assert table.remove(which % len(table)) is removed
            assert table.find(removed.id) is None
        table.check_integrity()
        for row, sequence in enumerate(table.sequences):
            assert table.find(sequence.id) == row
            assert [cache.content[row] for cache in caches] == [sequence.id] * 2
        for row, held in enumerate(table._prefixes._held[:-1]):
            for cache, columns in zip(caches, held.lengths, strict=True):
                first = int(table._prefixes._tokens[row, 0])
                assert not columns or cache.content[row] == str(first), (row, held)
        covered = [row for _, rows in table.groups() for row in range(rows.start, rows.stop)]
        assert covered == list(range(len(table)))


def test_group_of_one_method_is_one_slice() -> None:
    table, caches = make_table()
    for number, method in enumerate(["target", "mmtad", "target", "draft"]):
        insert(table, caches, request(str(number), [1, 2], method))
    assert [(preset.method, rows) for preset, rows in table.groups()] == [
        ("target", slice(0, 2)),
        ("mmtad", slice(2, 3)),
        ("draft", slice(3, 4)),
    ]
    assert table.num_free == 0


def test_joining_moves_at_most_one_row_per_group() -> None:
    table, caches = make_table(rows=6)
    moves: list[tuple[int, int]] = []
    for number, method in enumerate(["target", "draft", "draft", "mmtad", "mmtad"]):
        insert(table, caches, request(str(number), [1, 2], method))
    caches[0].move_row = lambda source, destination: moves.append((source, destination))  # type: ignore
    insert(table, caches, request("new", [1, 2], "target"))
    assert moves == [(3, 5), (1, 3), (6, 1)]


def test_unused_model_keeps_no_columns() -> None:
    table, (target, draft) = make_table()
    insert(table, [target, draft], request("a", [1, 2, 3], "target"))
    insert(table, [target, draft], request("b", [1, 2, 3], "draft"))
    assert (target.lengths[:2], draft.lengths[:2]) == ([2, 0], [0, 2])


def test_lengths_follow_a_step() -> None:
    table, (target, draft) = make_table()
    insert(table, [target, draft], request("a", [1, 2, 3], "mmtad"))
    table.sequences[0].output_ids += [4, 5]
    table.set_lengths(slice(0, 1))
    assert (target.lengths[0], draft.lengths[0]) == (4, 4)


def test_integrity_check_finds_a_broken_group_and_a_stale_length() -> None:
    table, caches = make_table()
    for number, method in enumerate(["target", "draft", "draft"]):
        insert(table, caches, request(str(number), [1, 2], method))
    table.check_integrity()
    caches[1].lengths[3] = 1
    with pytest.raises(AssertionError):
        table.check_integrity()
    caches[1].lengths[3] = 0
    table.sequences[0], table.sequences[1] = table.sequences[1], table.sequences[0]
    with pytest.raises(AssertionError):
        table.check_integrity()
