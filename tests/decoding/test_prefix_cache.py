"""Prompts that begin alike: what is copied is what would have been computed, and nothing else is."""

import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from decoding import Engine, FinishReason, ModelPair, Sequence
from decoding.model import CausalModel
from tests.decoding.test_adaptive_engine import Scripted
from tests.decoding.test_engine import poisoned
from tests.decoding.tiny import (
    METHODS,
    Text,
    causal,
    drain,
    generate,
    llama_pair,
    make_pair,
    plain,
    request,
    tiny_gpt2,
    tiny_llama,
)

PROMPT = [3, 8, 1, 4, 9, 2, 2, 7, 5, 6]
BRANCH = [*PROMPT[:6], 11, 12, 13]  # six tokens alike


@pytest.fixture
def pair() -> ModelPair:
    return llama_pair()


def ask(name: str, prompt: list[int], method: str = "mmtad", **fields: Any) -> Sequence:
    settings = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}
    return request(name, prompt, method, **settings)


def serve(engine: Engine, sequence: Sequence) -> tuple[Text, int]:
    """One sequence to its end: its text and how many tokens of its prompt were run."""
    engine.add(sequence)
    texts, prefilled = dict[str, Text](), 0
    while engine.has_work():
        for output in engine.step():
            assert output.num_reused == sequence.num_reused
            texts.setdefault(output.id, Text()).take(output)
        prefilled += engine.last_step.prefill_tokens
        engine.check_integrity()
    return texts[sequence.id], prefilled


def alone(pair: ModelPair, sequence: Sequence) -> Text:
    """Its text in an engine and in caches of its own, where nothing can be reused."""
    assert pair.draft is not None
    fresh = replace(sequence, output_ids=[], num_steps=0, num_reused=None)
    apart = make_pair(pair.target.module, pair.draft.module, rows=2, eos=pair.eos_token_ids)
    return generate(apart, fresh)[sequence.id]


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("method", METHODS)
def test_text_is_that_of_a_prompt_run_from_its_start(
    method: str, temperature: float, pair: ModelPair
) -> None:
    """Another prompt with the same beginning, then a conversation that goes on from the first answer."""
    engine = Engine(pair, 4)
    fields = {"temperature": temperature, "seed": 5, "num_top_log_probs": 2}
    first = ask("first", PROMPT, method, **fields)
    serve(engine, first)
    branch = ask("branch", BRANCH, method, **fields)
    turn = ask("turn", [*PROMPT, *first.output_ids, 4, 5], method, **fields)
    lag = 0 if method in ("target", "draft", "mtjd") else 1  # of the draft behind the target
    for sequence, reused, run in [(branch, 6, 2), (turn, 17, 2 + lag)]:
        text, prefilled = serve(engine, sequence)
        assert (sequence.num_reused, prefilled) == (reused, run)
        expected = alone(pair, sequence)
        assert text.token_ids == expected.token_ids
        assert text.log_probs == pytest.approx(expected.log_probs, abs=1e-9)
        assert [len(each.token_ids) for each in text.steps] == [
            len(each.token_ids) for each in expected.steps
        ]


def test_last_token_of_a_prompt_is_always_run(pair: ModelPair) -> None:
    engine = Engine(pair, 4)
    for reused in (0, len(PROMPT) - 1):
        again = ask("a", PROMPT)
        serve(engine, again)
        assert again.num_reused == reused


def assert_held_columns_equal_recomputation(engine: Engine, references: list[CausalModel]) -> Counter[str]:
    """To 1e-10, of every row that may be copied from; returns how many rows of each kind were compared."""
    compared = Counter[str]()
    prefixes, staging = engine._prefixes, engine._rows.staging
    for row, held in enumerate(prefixes._held):
        for role, (model, reference) in enumerate(zip(engine._models, references, strict=True)):
            length = model.cache.lengths[row] if row == staging else held.lengths[role]
            if not length:
                continue
            token_ids = [int(token) for token in prefixes._tokens[row, :length]]
            reference.cache.clear_row(0)
            reference.prefill(0, token_ids)
            torch.testing.assert_close(
                model.cache.storage[:, :, row, :, :length],
                reference.cache.storage[:, :, 0, :, :length],
                rtol=0,
                atol=1e-10,
            )
            kind = "staged" if row == staging else "running" if row < engine.num_running else "left"
            compared[f"{kind} {role}"] += 1
    return compared


def test_held_columns_equal_recomputation_in_random_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Branches and continuations of a few texts by every method, joins, leaves, cancels, few rows.

    Some are decoded by the target alone for a while, so that their draft lags far behind. Guards a row
    moved without its record, a draft's missing last column, tokens beside the wrong columns.
    """
    # The same traffic each time: how long a prompt is prefilled beside others depends on the clock.
    monkeypatch.setattr("decoding.prompt_queue.time", SimpleNamespace(monotonic=lambda: 0.0))
    pair = make_pair(tiny_llama(), tiny_gpt2(seed=1), rows=5, eos=(2,))
    references = [causal(model.module, rows=1) for model in pair.models.values()]
    rng = random.Random(4)
    known, compared, reused = [PROMPT, BRANCH], Counter[str](), Counter[str]()
    engine = Engine(pair, 4, prefill_chunk=4, policy=Scripted())
    for step in range(80):
        while engine.num_running + engine.num_waiting < rng.choice([1, 2, 4]):
            base = rng.choice(known[-6:])
            prompt = [*base[: rng.randint(1, 40)], *(rng.randrange(24) for _ in range(rng.randint(1, 4)))]
            engine.add(
                ask(
                    f"{step}.{engine.num_running + engine.num_waiting}",
                    prompt,
                    rng.choice(METHODS),
                    max_tokens=rng.randint(1, 12),
                    temperature=rng.choice([0, 1.0]),
                    ignore_eos=rng.random() < 0.5,
                    adaptive=rng.random() < 0.3,
                    prompt_log_probs=rng.random() < 0.1,
                    cache_salt=rng.choice(["", "", "", "other"]),
                )
            )
        running = list(engine._rows.sequences)
        engine.step()
        known += [each.prompt_ids + each.output_ids for each in running if each not in engine._rows.sequences]
        for sequence in engine._rows.sequences:
            reused[sequence.config.method] = max(reused[sequence.config.method], sequence.num_reused or 0)
        if rng.random() < 0.15 and engine.num_running:
            engine.cancel(rng.choice(engine._rows.sequences).id)
        engine.check_integrity()
        with torch.inference_mode():
            compared += assert_held_columns_equal_recomputation(engine, references)
    assert min(compared[f"{kind} {role}"] for kind in ("staged", "running", "left") for role in (0, 1)) > 10
    assert min(reused[method] for method in METHODS) > 5


def test_models_may_have_prefixes_of_different_lengths(pair: ModelPair) -> None:
    """The draft runs what only the target has, in the same chunks."""
    engine = Engine(pair, 4, prefill_chunk=4)
    serve(engine, ask("target alone", PROMPT, "target"))
    both = ask("both", BRANCH, "mmtad")
    text, prefilled = serve(engine, both)
    assert (both.num_reused, prefilled) == (6, 8)
    assert text.token_ids == alone(pair, both).token_ids
    draft = ask("draft alone", [*PROMPT[:4], 1, 1], "draft")
    serve(engine, draft)
    assert draft.num_reused == 4


def test_row_without_a_sequence_is_kept_until_it_is_needed(pair: ModelPair) -> None:
    """The one that was used longest ago goes first; what goes on elsewhere is not kept twice."""
    engine, talks = Engine(pair, 3), [[number, *range(10, 18)] for number in range(4)]

    def goes_on(number: int) -> bool:
        known = len(talks[number]) - 1
        sequence = ask(str(number), [*talks[number], 3], "target")
        serve(engine, sequence)
        talks[number] = sequence.prompt_ids + sequence.output_ids
        return sequence.num_reused == known

    assert [goes_on(number) for number in (0, 1, 2)] == [False] * 3
    assert goes_on(0)
    assert not goes_on(3)  # in place of 1
    assert all(goes_on(number) for number in (2, 0, 3, 3, 0, 2))
    assert not goes_on(1)


def test_running_sequence_gives_its_prompt(pair: ModelPair) -> None:
    engine = Engine(pair, 3)
    engine.add(ask("runs on", PROMPT, "target", max_tokens=60))
    engine.step()
    engine.add(ask("another", [9, 9], "target", max_tokens=60))
    engine.step()
    engine.add(ask("branch", BRANCH, "target"))
    engine.step()
    assert [each.num_reused for each in engine._rows.sequences] == [0, 0, 6]
    drain(engine, check=True)


def test_full_batch_keeps_what_it_can(pair: ModelPair) -> None:
    """Rows are moved when one leaves: the last one's columns stay, and texts are as without reuse."""
    engine = Engine(pair, 3)
    sequences = [ask(str(n), [n, *PROMPT], METHODS[n], max_tokens=3 + n) for n in range(7)]
    for sequence in sequences:
        engine.add(sequence)
    texts = drain(engine, check=True)
    for sequence in sequences:
        assert texts[sequence.id].token_ids == alone(pair, sequence).token_ids


def test_scores_of_a_prompt_are_computed_at_every_token(pair: ModelPair) -> None:
    """Columns hold no logits; its columns are then as good as any."""
    engine = Engine(pair, 4)
    serve(engine, ask("first", PROMPT, "target"))
    scored = ask("scored", BRANCH, "target", prompt_log_probs=True)
    text, prefilled = serve(engine, scored)
    assert (scored.num_reused, prefilled) == (0, len(BRANCH) - 1)
    log_probs = plain(pair.target, BRANCH)
    expected = [log_probs[place, token].item() for place, token in enumerate(BRANCH[1:])]
    assert text.prompt_log_probs is not None
    assert [each.log_prob for each in text.prompt_log_probs] == pytest.approx(expected, abs=1e-9)
    after = ask("after", [*BRANCH, 1])
    serve(engine, after)
    assert after.num_reused == len(BRANCH)


def test_salts_keep_sequences_apart(pair: ModelPair) -> None:
    """Time and `num_reused` tell nobody what others have asked."""
    engine = Engine(pair, 4)
    serve(engine, ask("first", PROMPT, cache_salt="a"))
    for prompt in (PROMPT, BRANCH):
        other = ask("other", prompt, cache_salt="b")
        assert serve(engine, other)[1] == len(prompt) - 1 - (0 if prompt is PROMPT else 6)
    same = ask("same", [*PROMPT, 1], cache_salt="a")
    serve(engine, same)
    assert same.num_reused == len(PROMPT)


def test_without_reuse_only_equal_prompts_share(pair: ModelPair) -> None:
    engine = Engine(pair, 4, prefix_caching=False)
    for prompt, reused in [(PROMPT, 0), (PROMPT, len(PROMPT) - 1), (BRANCH, 0), (PROMPT, 0)]:
        sequence = ask("a", prompt)
        serve(engine, sequence)
        assert sequence.num_reused == reused


def heal(pair: ModelPair) -> None:
    for model in pair.models.values():
        with torch.no_grad():
            model.module.get_input_embeddings().weight[7] = 0.1


@pytest.fixture
def broken() -> ModelPair:
    """Gives no numbers from token 7 on, until it is healed."""
    return make_pair(poisoned(tiny_llama()), poisoned(tiny_gpt2()), rows=5)


@pytest.mark.parametrize("fields", [{}, {"max_tokens": 0, "prompt_log_probs": True}], ids=str)
def test_row_that_ended_without_numbers_gives_nothing(fields: dict[str, Any], broken: ModelPair) -> None:
    """A fault that passes must not stay in the prompts that follow."""
    engine = Engine(broken, 3)
    text, _ = serve(engine, ask("bad", PROMPT, "target", **fields))
    assert text.finish_reason is FinishReason.ERROR
    heal(broken)
    for prompt in (PROMPT, [*PROMPT, 1, 2]):
        good = ask("good", prompt, "target")
        text, _ = serve(engine, good)
        assert text.token_ids == alone(broken, good).token_ids
        assert good.num_reused == (0 if prompt is PROMPT else len(PROMPT))


@pytest.mark.parametrize("chunk", [8, 256])
def test_sequence_cancelled_before_its_first_step_gives_nothing(chunk: int, broken: ModelPair) -> None:
    """In the middle of its prefill, or in its row while another group was decoded."""
    engine = Engine(broken, 3, prefill_chunk=chunk)
    engine.add(ask("neighbour", [1], "draft", max_tokens=50))
    engine.add(ask("bad", [*PROMPT, 1, 1], "target"))
    engine._admit()
    assert engine.num_waiting == (chunk == 8)
    assert engine.cancel("bad")
    heal(broken)
    engine.cancel("neighbour")
    good = ask("good", [*PROMPT, 1, 1], "target")
    text, _ = serve(engine, good)
    assert good.num_reused == 0
    assert text.token_ids == alone(broken, good).token_ids


def test_running_sequence_gives_nothing_before_its_first_step(broken: ModelPair) -> None:
    """It may turn out to hold no numbers: only a pass tells."""
    engine = Engine(broken, 4)
    good = ask("good", [*PROMPT, 1, 1], "target")
    for sequence in (ask("bad", PROMPT, "target"), ask("between", [9, 9, 9], "target"), good):
        engine.add(sequence)
        engine._admit()
        heal(broken)
    assert good.num_reused == 0
    texts = drain(engine, check=True)
    assert texts["bad"].finish_reason is FinishReason.ERROR
    assert texts["good"].token_ids == alone(broken, good).token_ids


def test_cancelled_sequence_that_was_decoded_gives_what_it_had(pair: ModelPair) -> None:
    engine = Engine(pair, 3)
    engine.add(gone := ask("gone", PROMPT, max_tokens=60))
    for _ in range(3):
        engine.step()
    assert engine.cancel("gone")
    engine.check_integrity()
    after = ask("after", [*PROMPT, *gone.output_ids, 1])
    text, _ = serve(engine, after)
    assert after.num_reused == len(PROMPT) + len(gone.output_ids) - 1
    assert text.token_ids == alone(pair, after).token_ids


def test_step_that_broke_off_leaves_nothing_to_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any row may be half written, also those that were sound before."""
    pair = llama_pair()
    engine = Engine(pair, 3)
    serve(engine, ask("before", PROMPT, "target"))
    engine.add(ask("breaks", BRANCH, "target", max_tokens=30))
    engine.step()

    def break_off(rows: slice, *_: Any, **__: Any) -> torch.Tensor:
        pair.target.cache.storage[:, :, rows] = torch.nan
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(pair.target, "forward", break_off)
        with pytest.raises(RuntimeError, match="broken") as raised:
            engine.step()
    assert engine.retreat(raised.value) is None
    assert engine.cancel("breaks")
    engine.check_integrity()
    after = ask("after", BRANCH, "target")
    text, _ = serve(engine, after)
    assert after.num_reused == 0
    assert text.token_ids == alone(pair, after).token_ids
