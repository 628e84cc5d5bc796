"""An engine whose device has no memory left in some pass: everybody's text goes on as if nothing were."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from decoding import Engine, ModelPair, Retreat, Sequence
from decoding.batch_limit import EASE_SECONDS
from decoding.model import CausalModel
from tests.decoding.tiny import METHODS, Text, generate, llama_pair, request

NAMES = "abcde"


def sequences(method: str = "mmtad", **fields: Any) -> list[Sequence]:
    """Prompts and seeds of their own, so that mixed-up rows show."""
    return [
        request(
            name, [3 + number, 8, 1], method, **{"max_tokens": 9, "seed": number, "ignore_eos": True} | fields
        )
        for number, name in enumerate(NAMES)
    ]


def spoil(model: CausalModel, name: str, fails: Callable[[slice], bool]) -> None:
    """The pass `name` of a model runs, then finds no memory for its logits where `fails(rows)`."""
    run = getattr(model, name)

    def spoiled(rows: Any, *args: Any, **options: Any) -> Any:
        logits = run(rows, *args, **options)
        if fails(rows):
            raise torch.OutOfMemoryError("no more")
        return logits

    setattr(model, name, spoiled)


def once(condition: Callable[[slice], bool]) -> Callable[[slice], bool]:
    left = [True]

    def check(rows: slice) -> bool:
        if not (left and condition(rows)):
            return False
        left.pop()
        return True

    return check


def take(engine: Engine, texts: dict[str, Text]) -> Retreat | None:
    """A step as a worker makes it; what became of it if it raised."""
    try:
        outputs = engine.step()
    except torch.OutOfMemoryError as error:
        retreat = engine.retreat(error)
        assert retreat is not None
        return retreat
    finally:
        engine.check_integrity()
    for output in outputs:
        texts.setdefault(output.id, Text()).take(output)
    return None


def run(engine: Engine, texts: dict[str, Text]) -> list[Retreat]:
    retreats = []
    while engine.has_work():
        retreats.append(take(engine, texts))
    return [retreat for retreat in retreats if retreat is not None]


@pytest.fixture
def pair() -> ModelPair:
    return llama_pair()


def run_all(engine: Engine, added: list[Sequence]) -> tuple[dict[str, Text], list[Retreat]]:
    for sequence in added:
        engine.add(sequence)
    texts: dict[str, Text] = {}
    return texts, run(engine, texts)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_too_large_goes_on_in_smaller_ones(method: str) -> None:
    """At most two rows fit: nobody is lost, and no text changes by a token."""
    expected = {name: text.token_ids for name, text in generate(llama_pair(), *sequences(method)).items()}
    pair = llama_pair()
    spoil(
        pair.models["draft" if method == "draft" else "target"],
        "forward",
        lambda rows: rows.stop - rows.start > 2,
    )
    engine = Engine(pair, 5)
    texts, retreats = run_all(engine, sequences(method))
    assert {name: text.token_ids for name, text in texts.items()} == expected
    assert [retreat.lost for retreat in retreats] == [[]] * len(retreats)
    assert 1 <= len(retreats) <= 2
    assert engine.draft_enabled


def test_the_youngest_waits_again_and_keeps_its_text(pair: ModelPair) -> None:
    expected = generate(llama_pair(), *sequences(max_tokens=60))
    engine = Engine(pair, 5)
    for sequence in sequences(max_tokens=60):
        engine.add(sequence)
    texts: dict[str, Text] = {}
    for _ in range(8):
        take(engine, texts)
    spoil(pair.target, "forward", once(lambda rows: True))
    assert take(engine, texts) == Retreat("out_of_memory", [])
    assert [sequence.id for sequence in engine._queue] == [NAMES[-1]]
    assert (engine.num_running, engine.num_waiting) == (4, 1)
    assert texts[NAMES[-1]].token_ids
    run(engine, texts)
    for name, text in texts.items():
        assert text.token_ids == expected[name].token_ids
        assert text.log_probs == pytest.approx(expected[name].log_probs, abs=1e-9)


def test_a_second_time_it_fails_alone(pair: ModelPair) -> None:
    """A row that never fits is lost, once it was tried alone; all others are served."""
    expected = generate(llama_pair(), *sequences())
    engine = Engine(pair, 5)

    def holds_the_last(rows: slice) -> bool:
        return any(sequence.id == NAMES[-1] for sequence in engine._rows.sequences[rows])

    spoil(pair.target, "forward", holds_the_last)
    texts, retreats = run_all(engine, sequences())
    assert [name for retreat in retreats for name in retreat.lost] == [NAMES[-1]]
    assert {name: text.token_ids for name, text in texts.items()} == {
        name: text.token_ids for name, text in expected.items() if name != NAMES[-1]
    }


def test_a_prompt_too_long_for_memory_is_prefilled_in_smaller_chunks(pair: ModelPair) -> None:
    prompt = [3, 8, 1, 4, 9, 2, 2, 7, 5, 6] * 4
    (expected,) = generate(llama_pair(), request("a", prompt, max_tokens=5)).values()
    run_prefill = pair.target.prefill

    def spoiled(row: int, token_ids: list[int], **options: Any) -> Any:
        if len(token_ids) > 8:
            raise torch.OutOfMemoryError("no more")
        return run_prefill(row, token_ids, **options)

    pair.target.prefill = spoiled  # type: ignore[method-assign]
    engine = Engine(pair, 2, prefill_chunk=16)
    texts, retreats = run_all(engine, [request("a", prompt, max_tokens=5)])
    assert texts["a"].token_ids == expected.token_ids
    assert retreats == [Retreat("out_of_memory", [])]


def test_outputs_of_a_step_that_raised_come_with_the_next(pair: ModelPair) -> None:
    """A prompt that only wants to be scored ends in the part of the step before the one that raises."""
    engine = Engine(pair, 3)
    engine.add(request("a", [3, 8, 1], max_tokens=20, ignore_eos=True))
    engine.step()
    spoil(pair.target, "forward", once(lambda rows: True))
    engine.add(request("scored", [4, 5], max_tokens=0, prompt_log_probs=True))
    engine.add(request("nothing", [4, 5], max_tokens=0))
    texts: dict[str, Text] = {}
    assert len(run(engine, texts)) == 1
    assert texts["scored"].prompt_log_probs is not None
    assert texts["nothing"].token_ids == []


def test_with_time_batches_grow_again(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("decoding.engine.time.monotonic", lambda: now[0])
    engine = Engine(pair, 5)
    spoil(pair.target, "forward", once(lambda rows: rows.stop - rows.start == 5))
    for sequence in sequences(max_tokens=60):
        engine.add(sequence)
    sizes = []
    for step in range(12):
        try:
            engine.step()
            sizes.append(engine.last_step.num_sequences)
        except torch.OutOfMemoryError as error:
            engine.retreat(error)
        now[0] += EASE_SECONDS if step > 8 else 0
    assert sizes[:4] == [1, 2, 3, 4]  # one more is prefilled in each step; the fifth raises
    assert max(sizes[4:8]) == 2
    assert sizes[-1] == 5
