"""Long prompts beside short ones: nobody is held up, nobody starves, and no text changes."""

import itertools
import random
from typing import Any

import pytest
import torch

from decoding import Engine, ModelPair, Sequence
from tests.decoding.tiny import METHODS, drain, generate, llama_pair, request

CHUNK = 4
LONG = [3, 8, 1, 4, 9, 2, 2, 7, 5, 6] * 6


def long_one(**fields: Any) -> Sequence:
    return request("long", LONG, **{"max_tokens": 4, "temperature": 0} | fields)


def short_one(name: str, **fields: Any) -> Sequence:
    return request(name, [5, 9, len(name)], **{"max_tokens": 4, "temperature": 0} | fields)


@pytest.fixture
def pair() -> ModelPair:
    return llama_pair()


class Clock:
    """Each look at it takes a second, so that every part of a step takes a known time."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("engine", "prompt_queue"):
        monkeypatch.setattr(f"decoding.{module}.time", clock)
    return clock


def test_a_short_prompt_passes_a_long_one(pair: ModelPair) -> None:
    engine = Engine(pair, 4, prefill_chunk=CHUNK)
    engine.add(long_one())
    engine.add(short_one("a"))
    outputs = engine.step()
    assert [output.id for output in outputs] == ["a"]
    assert engine.num_waiting == 1
    engine.check_integrity()
    assert {name for name, _ in engine.last_step.prefills} == {"long", "a"}


def test_texts_are_the_same_as_alone(pair: ModelPair) -> None:
    alone = {
        name: generate(llama_pair(), sequence)[name].token_ids
        for name, sequence in {"long": long_one(), **{n: short_one(n) for n in ("a", "bb", "ccc")}}.items()
    }
    engine = Engine(pair, 4, prefill_chunk=CHUNK)
    for sequence in (long_one(), *map(short_one, ("a", "bb", "ccc"))):
        engine.add(sequence)
    assert {name: text.token_ids for name, text in drain(engine, check=True).items()} == alone


def test_a_row_is_kept_for_the_long_one(pair: ModelPair) -> None:
    """Others cannot take every row that is free, one after another, while it is prefilled."""
    engine = Engine(pair, 2, prefill_chunk=CHUNK)
    for sequence in (long_one(), *(short_one(name, max_tokens=60) for name in ("a", "bb"))):
        engine.add(sequence)
    while "long" in {sequence.id for sequence in engine._queue}:
        engine.step()
        assert {sequence.id for sequence in engine._rows.sequences} <= {"long", "a"}
    assert engine.num_running == 2


def test_the_long_one_is_not_starved_by_a_flood(pair: ModelPair, clock: Clock) -> None:
    """With two new prompts in every step it still has half of the time, and then a row."""
    engine = Engine(pair, 4, prefill_chunk=CHUNK)
    engine.add(long_one())
    chunks = steps = 0
    while "long" in {sequence.id for sequence in engine._queue}:
        for number in range(2):
            engine.add(short_one(f"{steps}.{number}"))
        engine.step()
        chunks += any(name == "long" for name, _ in engine.last_step.prefills)
        steps += 1
    assert chunks == -(-(len(LONG) - 1) // CHUNK)
    assert steps <= 2 * chunks


@pytest.mark.parametrize("behind", [False, True], ids=["at once", "device behind"])
def test_running_rows_have_as_long_as_a_chunk_took(
    behind: bool, pair: ModelPair, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk that takes as long as several steps is followed by as many without one."""
    prefill, queued = pair.target.prefill, 0.0

    def slow(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal queued
        queued += 30.0
        if not behind:
            finish()
        return prefill(*args, **options)

    def finish(*_: Any) -> None:
        nonlocal queued
        clock.now, queued = clock.now + queued, 0.0

    monkeypatch.setattr("decoding.prompt_queue.finish_queued", finish)

    engine = Engine(pair, 4, prefill_chunk=CHUNK)
    engine.add(short_one("a", max_tokens=80, ignore_eos=True, num_speculative_tokens=1))
    engine.step()
    pair.target.prefill = slow  # type: ignore[method-assign]
    engine.add(long_one())
    chunks = []
    while engine.num_running == 1:
        engine.step()
        chunks.append(bool(engine.last_step.prefills))
    places = [step for step, prefilled in enumerate(chunks) if prefilled]
    assert places[0] == 0
    assert len(places) >= 3
    assert min(later - earlier for earlier, later in itertools.pairwise(places)) >= 5


@pytest.mark.parametrize(("prompts", "waits"), [(["long"], False), (["a"], False), (["long", "a"], True)])
def test_only_a_long_prompt_that_shares_time_is_waited_for(
    prompts: list[str], waits: bool, pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr("decoding.prompt_queue.finish_queued", waited.append)
    engine = Engine(pair, 4, prefill_chunk=CHUNK)
    for name in prompts:
        engine.add(long_one() if name == "long" else short_one(name))
    drain(engine)
    assert bool(waited) == waits
    assert set(waited) <= {pair.device}


@pytest.mark.parametrize("seed", range(6))
def test_random_lengths_on_few_rows(seed: int, pair: ModelPair) -> None:
    """Prompts of all lengths, with scores and without, cancelled at times: rows, caches, texts stay right."""
    rng = random.Random(seed)

    def one(number: int) -> Sequence:
        local = random.Random(1000 * seed + number)
        prompt = [local.randrange(24) for _ in range(local.choice([1, 2, 4, 5, 6, 20, 40]))]
        fields = {"max_tokens": local.randrange(12), "temperature": 0.8, "seed": number}
        scored = local.random() < 0.3
        return request(str(number), prompt, local.choice(METHODS), prompt_log_probs=scored, **fields)

    engine = Engine(pair, rng.choice([1, 2, 3, 5]), prefill_chunk=CHUNK)
    cancelled = set()
    for number in range(12):
        engine.add(one(number))
    for _ in range(3):
        engine.step()
        engine.check_integrity()
        victim = str(rng.randrange(12))
        if engine.cancel(victim):
            cancelled.add(victim)
            engine.check_integrity()
    delivered = {sequence.id: list(sequence.output_ids) for sequence in engine._rows.sequences}
    texts = drain(engine, check=True)
    for number in range(12):
        name = str(number)
        if name in texts and name not in cancelled:
            alone = generate(llama_pair(), one(number))[name]
            assert delivered.get(name, []) + texts[name].token_ids == alone.token_ids
