"""The task of pair T: a line with a table's columns and a question, answered by one SQL query.

    t:orders(id,city,price)|q:highest price in rome?|select max(price) from orders where city='rome';

Everything is drawn from a seeded generator. Answers to train on come from an imperfect author: each part
of a query is wrong with a stated chance, and a right one may be written in several ways. So a model of
them is right when it takes the likeliest, and errs at about the author's rate when it samples. Reference
answers are never wrong.
"""

# ruff: noqa: S608 - queries are written as text here, and run on databases made for them alone.

import random
from dataclasses import dataclass, replace

TABLES = ("orders", "people", "cars", "books", "games", "songs", "shops", "trips", "films", "teams")
TEXT_COLUMNS = {
    "city": ("rome", "oslo", "lima", "paris", "cairo", "delhi", "tokyo", "quito"),
    "color": ("red", "blue", "green", "black", "white", "gold"),
    "kind": ("small", "large", "fast", "cheap", "new", "old"),
    "owner": ("anna", "bob", "carl", "dora", "emil", "fay", "gus", "hana"),
    "team": ("lions", "bears", "hawks", "wolves", "foxes"),
    "state": ("open", "done", "late", "lost", "sent"),
}
NUMBER_COLUMNS = ("price", "age", "size", "weight", "score", "year", "stock", "cost")
AGGREGATES = {
    "max": ("highest", "largest", "top"),
    "min": ("lowest", "smallest", "least"),
    "avg": ("average", "mean", "typical"),
    "sum": ("total", "sum of", "overall"),
}
COMPARISONS = {">": ("over", "above", "more than"), "<": ("under", "below", "less than")}
PROMPT_END = "|"


@dataclass(frozen=True, slots=True)
class Query:
    """The meaning of one answer; a part that its `form` does not use is empty.

    `form` is one of `aggregate`, `count`, `list`, `best` and `groups`. `where` names a text column,
    `value` is what it must equal; `compared` names a number column, `comparison` and `bound` its limit.
    """

    form: str
    table: str
    aggregate: str = ""
    number: str = ""
    text: str = ""
    where: str = ""
    value: str = ""
    compared: str = ""
    comparison: str = ""
    bound: int = 0


@dataclass(frozen=True, slots=True)
class Example:
    """A table's columns, a question, and the query that answers it."""

    columns: tuple[str, ...]
    question: str
    query: Query

    @property
    def prompt(self) -> str:
        """What the model is given; the answer follows it at once."""
        return f"t:{self.query.table}({','.join(self.columns)})|q:{self.question}?{PROMPT_END}"

    @property
    def reference(self) -> str:
        """The right answer in its plainest form."""
        return write_sql(self.query)


def make_example(rng: random.Random) -> Example:
    """One table with a question about it."""
    texts = rng.sample(sorted(TEXT_COLUMNS), rng.choice((2, 3)))
    numbers = rng.sample(NUMBER_COLUMNS, 2)
    others = [*texts, *numbers]
    rng.shuffle(others)
    form = rng.choice(("aggregate", "aggregate", "count", "list", "best", "groups"))
    query = Query(form, rng.choice(TABLES), number=numbers[0], text=texts[0])
    if form in ("aggregate", "groups"):
        query = replace(query, aggregate=rng.choice(sorted(AGGREGATES)))
    if form == "best":
        query = replace(query, aggregate=rng.choice(("max", "min")))
    if form in ("count", "list") or (form == "aggregate" and rng.random() < 0.8):
        query = _with_condition(query, rng, texts[-1], numbers[-1])
    return Example(("id", *others), _question(query, rng), query)


def _with_condition(query: Query, rng: random.Random, text: str, number: str) -> Query:
    if rng.random() < 0.6:
        return replace(query, where=text, value=rng.choice(TEXT_COLUMNS[text]))
    return replace(query, compared=number, comparison=rng.choice(sorted(COMPARISONS)), bound=_bound(rng))


def _bound(rng: random.Random) -> int:
    """Away from the ends of the column's values, so that no condition leaves out every row."""
    return rng.randrange(20, 80)


def _question(query: Query, rng: random.Random) -> str:
    word = rng.choice(AGGREGATES[query.aggregate]) if query.aggregate else ""
    match query.form:
        case "aggregate":
            start = f"{word} {query.number}"
        case "count":
            start = rng.choice(("how many {}", "number of {}", "count the {}")).format(query.table)
        case "list":
            start = rng.choice(("{} of {}", "list {} of {}", "show {} of {}"))
            start = start.format(query.text, query.table)
        case "best":
            start = f"{rng.choice(('which', 'what'))} {query.text} has the {word} {query.number}"
        case _:
            start = f"{word} {query.number} {rng.choice(('per', 'for each', 'by'))} {query.text}"
    return start + _condition_words(query, rng)


def _condition_words(query: Query, rng: random.Random) -> str:
    if query.where:
        return f" {rng.choice(('with', 'for'))} {query.where} {query.value}"
    if query.compared:
        return f" with {query.compared} {rng.choice(COMPARISONS[query.comparison])} {query.bound}"
    return ""


def write_sql(query: Query, rng: random.Random | None = None) -> str:
    """`query` as SQL; with `rng` in one of several equivalent ways, the plainest one most often."""
    condition = _condition_sql(query, rng)
    match query.form:
        case "aggregate" if query.aggregate in ("max", "min") and _chance(rng, 0.3):
            order = " desc" if query.aggregate == "max" else ""
            condition += f" order by {query.number}{order} limit 1"
            return f"select {query.number} from {query.table}{condition};"
        case "aggregate":
            return f"select {query.aggregate}({query.number}) from {query.table}{condition};"
        case "count":
            counted = "id" if _chance(rng, 0.3) else "*"
            return f"select count({counted}) from {query.table}{condition};"
        case "list":
            return f"select {query.text} from {query.table}{condition};"
        case "best":
            order = " desc" if query.aggregate == "max" else ""
            return f"select {query.text} from {query.table} order by {query.number}{order} limit 1;"
    columns = f"{query.text},{query.aggregate}({query.number})"
    return f"select {columns} from {query.table} group by {query.text};"


def _condition_sql(query: Query, rng: random.Random | None) -> str:
    if query.where:
        gap = " " if _chance(rng, 0.25) else ""
        return f" where {query.where}{gap}={gap}'{query.value}'"
    if query.compared and _chance(rng, 0.25):
        turned = "<" if query.comparison == ">" else ">"
        return f" where {query.bound}{turned}{query.compared}"
    return f" where {query.compared}{query.comparison}{query.bound}" if query.compared else ""


def _chance(rng: random.Random | None, share: float) -> bool:
    return rng is not None and rng.random() < share


def write_answer(example: Example, rng: random.Random, noise: float) -> str:
    """An answer to train on: each part of the query is wrong with chance `noise`, its form varies."""
    query, changes = example.query, {}
    for part in ("aggregate", "number", "text", "where", "value", "compared", "comparison"):
        right = getattr(query, part)
        others = _mistakes(example, part)
        if right and others and rng.random() < noise:
            changes[part] = rng.choice(others)
    if query.bound and rng.random() < noise:
        query = replace(query, bound=_bound(rng))
    return write_sql(replace(query, **changes), rng)  # type: ignore[arg-type]


def _mistakes(example: Example, part: str) -> list[str]:
    """What an author may write in place of the right `part`."""
    query = example.query
    right: str = getattr(query, part)
    match part:
        case "aggregate":
            pool = ["max", "min"] if query.form == "best" else sorted(AGGREGATES)
        case "number" | "compared":
            pool = [name for name in example.columns if name in NUMBER_COLUMNS]
        case "text" | "where":
            pool = [name for name in example.columns if name in TEXT_COLUMNS]
        case "value":
            pool = list(TEXT_COLUMNS.get(query.where, ()))
        case _:
            pool = sorted(COMPARISONS)
    return [name for name in pool if name != right]
