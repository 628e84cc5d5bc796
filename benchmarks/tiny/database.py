"""Answers of the SQL task executed on SQLite, in memory, on a small table made from the prompt's columns."""

import random
import sqlite3
import zlib
from collections import Counter

from benchmarks.tiny.task import TEXT_COLUMNS, Example

NUM_ROWS = 40
MAX_STEPS = 100_000  # of SQLite's virtual machine, in thousands: no answer needs more
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}
Rows = Counter[tuple[object, ...]]


def make_database(example: Example) -> sqlite3.Connection:
    """The table of `example` with rows that its prompt decides; every text value occurs."""
    rng = random.Random(zlib.crc32(example.prompt.encode()))
    connection = sqlite3.connect(":memory:")
    columns = example.columns
    connection.execute(f"create table {example.query.table} ({','.join(columns)})")
    rows = [tuple(_value(name, number, rng) for name in columns) for number in range(1, NUM_ROWS + 1)]
    places = ",".join("?" * len(columns))
    connection.executemany(f"insert into {example.query.table} values ({places})", rows)  # noqa: S608
    connection.set_authorizer(lambda action, *_: _permit(action))
    return connection


def _value(column: str, number: int, rng: random.Random) -> str | int:
    if column == "id":
        return number
    values = TEXT_COLUMNS.get(column)
    if values is None:
        return rng.randrange(10, 100)
    return values[number] if number < len(values) else rng.choice(values)


def _permit(action: int) -> int:
    return sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY


def execute(connection: sqlite3.Connection, sql: str) -> Rows | None:
    """The rows that one query returns, in any order; None if SQLite refuses it or it does not end."""
    connection.set_progress_handler(lambda: 1, MAX_STEPS)
    try:
        cursor = connection.execute(sql)
        return Counter(cursor.fetchall()) if cursor.description else None
    except (sqlite3.Error, sqlite3.Warning):
        return None
    finally:
        connection.set_progress_handler(None, 0)


def is_correct(example: Example, answer: str) -> bool:
    """Whether `answer` returns what the reference answer returns."""
    connection = make_database(example)
    try:
        expected = execute(connection, example.reference)
        assert expected is not None, example.reference
        return execute(connection, answer) == expected
    finally:
        connection.close()
