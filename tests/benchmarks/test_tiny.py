"""The SQL task of pair T: its texts, its database, its vocabulary, and its training on the smallest scale."""

import random
from pathlib import Path

import pytest
import torch

from benchmarks.generation import Generation
from benchmarks.tiny import train
from benchmarks.tiny.card import grade, held_out, prompt_ids, write_cards
from benchmarks.tiny.database import execute, is_correct, make_database
from benchmarks.tiny.task import Example, Query, make_example, write_answer, write_sql
from benchmarks.tiny.tokenizer import BOS_ID, EOS_ID, VOCABULARY, encode_prompt, make_tokenizer
from decoding import load_model_pair

EXAMPLES = held_out(300, seed=3)


def test_every_way_of_writing_an_answer_is_right() -> None:
    rng = random.Random(1)
    assert all(is_correct(each, each.reference) for each in EXAMPLES)
    assert all(is_correct(each, write_sql(each.query, rng)) for each in EXAMPLES)
    assert all(is_correct(each, write_answer(each, rng, noise=0.0)) for each in EXAMPLES)


def test_noise_makes_mistakes_that_still_are_sql() -> None:
    rng = random.Random(1)
    answers = [write_answer(each, rng, noise=0.3) for each in EXAMPLES]
    share = sum(map(is_correct, EXAMPLES, answers)) / len(EXAMPLES)
    assert 0.2 < share < 0.6
    ran = [execute(make_database(each), answer) for each, answer in zip(EXAMPLES, answers, strict=True)]
    assert all(rows is not None for rows in ran)


def test_examples_are_reproducible_and_varied() -> None:
    assert held_out(300, seed=3) == EXAMPLES
    assert len({each.prompt for each in EXAMPLES}) == 300
    assert {each.query.form for each in EXAMPLES} == {"aggregate", "count", "list", "best", "groups"}


ORDERS = Example(
    ("id", "city", "price"), "highest price for city rome", Query("aggregate", "orders", "max", "price")
)


@pytest.mark.parametrize(
    "sql",
    [
        "",
        "select",
        "drop table orders;",
        "delete from orders;",
        "attach database 'x' as y;",
        "pragma writable_schema=1;",
        "select nothing from orders;",
        "select id from orders; select id from orders;",
        "with recursive n(x) as (select 1 union all select x+1 from n) select count(x) from n;",
        "select load_extension('x');",
    ],
)
def test_anything_but_one_query_that_ends_is_wrong(sql: str) -> None:
    assert execute(make_database(ORDERS), sql) is None
    assert not is_correct(ORDERS, sql)


def test_vocabulary_is_sixty_four_characters_round_trip() -> None:
    tokenizer = make_tokenizer()
    assert len(VOCABULARY) == len(set(VOCABULARY)) == len(tokenizer) == 64
    assert tokenizer.is_fast
    example = make_example(random.Random(0))
    text = example.prompt + example.reference
    ids = tokenizer.encode(text)
    assert ids == [BOS_ID, *encode_prompt(text)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.encode("A\n", add_special_tokens=False) == [encode_prompt("a")[0], 0]


def test_grading_cuts_at_the_end_token() -> None:
    example = EXAMPLES[0]
    right = Generation([*encode_prompt(example.reference), EOS_ID])
    wrong = Generation([*encode_prompt(example.reference + ";select 1"), EOS_ID])
    assert grade([example, example], [right, wrong]) == [True, False]


def test_padding_has_no_weight() -> None:
    token_ids, weights = next(train.batches(0, 0.1))
    assert token_ids.shape == (train.BATCH, weights.shape[1] + 1)
    assert ((weights > 0) == (token_ids[:, 1:] != 0)).all()
    ends = (token_ids[:, 1:] == EOS_ID) & (weights == 1)
    assert (ends.sum(1) == 1).all()


@pytest.mark.slow
def test_training_writes_a_pair_that_can_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.tiny.card.NUM_PROMPTS", 2)
    monkeypatch.setattr("benchmarks.tiny.card.MAX_ANSWER", 4)
    target, draft = train.Shape(1, 32).build(0), train.Shape(1, 32).build(1)
    settings = {"steps": 3, "rate": 1e-3, "noise": 0.1, "seed": 0, "name": "x"}
    before = [weight.clone() for weight in target.parameters()]
    train.fit(target, train.target_loss(target), **settings)  # type: ignore[arg-type]
    train.fit(draft, train.draft_loss(draft, target), **settings)  # type: ignore[arg-type]
    assert all((a != b).any() for a, b in zip(before, target.parameters(), strict=True))
    folders = tmp_path / "target", tmp_path / "draft"
    for model, folder in zip((target, draft), folders, strict=True):
        train.save(model, folder)
    arguments = {"noise": 0.1, "rate": 1e-3, "target_steps": 3, "draft_steps": 3, "seed": 0}
    write_cards(folders, arguments, seconds=60)
    assert "| greedy |" in (folders[0] / "README.md").read_text(encoding="utf-8")
    assert next(iter(target.parameters())).dtype == torch.float32


@pytest.mark.slow
def test_the_shipped_pair_loads() -> None:
    from benchmarks.pairs import TINY_FOLDERS

    pair = load_model_pair(*TINY_FOLDERS)
    assert pair.vocab_size == 64
    assert pair.eos_token_ids == (EOS_ID,)
    assert max(prompt_ids(EXAMPLES[0])) < 64
