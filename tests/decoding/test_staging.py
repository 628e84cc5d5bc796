"""The staging row: which prompts share a prefill and its scores, and that nothing of another stays."""

import math
from typing import Any

import pytest
import torch

from decoding import Engine, FinishReason, ModelPair, Sequence
from decoding.prefix_cache import PrefixCache
from decoding.staging import Staging
from tests.decoding.test_engine import poisoned
from tests.decoding.tiny import drain, generate, llama_pair, make_pair, plain, request, tiny_gpt2, tiny_llama

PROMPT = [3, 8, 1, 4, 9, 2, 2, 7, 5, 6]


@pytest.fixture
def pair() -> ModelPair:
    return llama_pair()


def scoring(name: str, prompt: list[int] = PROMPT, method: str = "target", **fields: Any) -> Sequence:
    settings = {"max_tokens": 0, "prompt_log_probs": True, "temperature": 0, **fields}
    return request(name, prompt, method, **settings)


def expected_scores(pair: ModelPair, prompt: list[int], role: str = "target") -> list[float]:
    log_probs = plain(pair.models[role], prompt)
    return [log_probs[place, token].item() for place, token in enumerate(prompt[1:])]


def scores(engine: Engine, name: str) -> list[float]:
    found = drain(engine, check=True)[name].prompt_log_probs
    assert found is not None
    return [each.log_prob for each in found]


@pytest.mark.parametrize("chunk", [1, 3, 9, 256])
def test_scores_do_not_depend_on_chunks(chunk: int, pair: ModelPair) -> None:
    """The token behind a chunk is scored by its last logits."""
    engine = Engine(pair, 2, prefill_chunk=chunk)
    engine.add(scoring("a"))
    assert scores(engine, "a") == pytest.approx(expected_scores(pair, PROMPT), abs=1e-9)


def test_prompts_that_differ_in_their_last_token_do_not_share_scores(pair: ModelPair) -> None:
    """It is scored but not cached: equal cached tokens are not equal scores."""
    other = [*PROMPT[:-1], 11]
    engine = Engine(pair, 4)
    for name, prompt in (("a", PROMPT), ("b", other)):
        engine.add(scoring(name, prompt))
    texts = drain(engine, check=True)
    for name, prompt in (("a", PROMPT), ("b", other)):
        found = texts[name].prompt_log_probs
        assert found is not None
        assert [each.log_prob for each in found] == pytest.approx(expected_scores(pair, prompt), abs=1e-9)


def test_scores_begun_for_one_are_finished_by_a_sequence_that_wants_none(pair: ModelPair) -> None:
    """The first is cancelled in its prefill; the next takes over, its own method and top k apart."""
    engine = Engine(pair, 2, prefill_chunk=4)
    engine.add(scoring("gone", num_top_log_probs=3))
    engine.step()
    assert engine.cancel("gone")
    engine.add(request("next", PROMPT, "draft", temperature=0, max_tokens=1, num_top_log_probs=1))
    engine.add(scoring("last", num_top_log_probs=3))
    texts = drain(engine, check=True)
    found = texts["last"].prompt_log_probs
    assert found is not None
    assert [each.log_prob for each in found] == pytest.approx(expected_scores(pair, PROMPT), abs=1e-9)
    assert {len(each.top) for each in found} == {3}
    assert texts["next"].prompt_log_probs is None


@pytest.mark.parametrize("first", [{}, {"method": "draft"}, {"num_top_log_probs": 2}], ids=str)
def test_scores_of_another_kind_are_not_taken(first: dict[str, Any], pair: ModelPair) -> None:
    """By another model, with another k, or none at all: the prompt is prefilled again."""
    engine = Engine(pair, 2)
    fields = {"max_tokens": 1, "prompt_log_probs": bool(first), **first}
    engine.add(request("first", PROMPT, fields.pop("method", "target"), temperature=0, **fields))
    drain(engine)
    engine.add(scoring("second", num_top_log_probs=4))
    found = drain(engine)["second"].prompt_log_probs
    assert found is not None
    assert [each.log_prob for each in found] == pytest.approx(expected_scores(pair, PROMPT), abs=1e-9)
    assert {len(each.top) for each in found} == {4}


def test_choices_share_one_scored_prefill(pair: ModelPair) -> None:
    """n choices that echo: one prefill, each its own copy of the scores."""
    engine, prefilled, found = Engine(pair, 8, prefill_chunk=4), 0, []
    for index in range(3):
        engine.add(scoring(str(index), method="mmtad", max_tokens=4, choice=index, temperature=1))
    while engine.has_work():
        found += [output.prompt_log_probs for output in engine.step() if output.prompt_log_probs]
        prefilled += engine.last_step.prefill_tokens
    assert prefilled == len(PROMPT) - 1
    assert len(found) == 3
    assert found[0] == found[1] == found[2]
    assert found[0] is not found[1]


def test_resumed_sequence_is_prefilled_beyond_its_prompt(pair: ModelPair) -> None:
    """Chunks that lie wholly behind the prompt have nothing to score."""
    sequence = scoring("a", max_tokens=9, ignore_eos=True)
    sequence.output_ids += [5, 1, 7, 7, 3]
    engine = Engine(pair, 2, prefill_chunk=3)
    engine.add(sequence)
    assert scores(engine, "a") == pytest.approx(expected_scores(pair, PROMPT), abs=1e-9)


def test_prompt_of_one_token_has_no_scores(pair: ModelPair) -> None:
    text = generate(pair, scoring("a", [4]))["a"]
    assert (text.prompt_log_probs, text.finish_reason) == ([], FinishReason.LENGTH)


def test_values_that_are_not_numbers_do_not_reach_the_next_prompt() -> None:
    """Masked columns still take part in a product; and a prompt that gives no numbers ends in an error."""
    pair = make_pair(poisoned(tiny_llama()), rows=3)
    engine = Engine(pair, 2, prefill_chunk=4)
    engine.add(scoring("bad", [7] * 9))
    text = drain(engine)["bad"]
    assert (text.finish_reason, text.prompt_log_probs) == (FinishReason.ERROR, None)
    engine.add(scoring("good", [4, 5]))
    after = drain(engine)["good"]
    assert after.finish_reason is FinishReason.LENGTH
    assert after.prompt_log_probs is not None
    assert all(math.isfinite(each.log_prob) for each in after.prompt_log_probs)
    assert pair.target.cache.storage.isfinite().all()


def test_cancelled_sequences_scores_are_not_given_to_its_namesake(pair: ModelPair) -> None:
    """Cancelled between its prefill and its first step; an id may be used again."""
    engine = Engine(pair, 4)
    engine.add(request("other", [1], "draft", max_tokens=90))
    engine.step()
    engine.add(scoring("a", max_tokens=5))
    engine.add(request("b", [1], "target", max_tokens=5))
    engine._admit()
    assert engine.num_running == 3
    assert engine.cancel("a")
    assert engine.cancel("other")
    engine.add(request("a", [4, 1], "target", max_tokens=2))
    assert drain(engine)["a"].prompt_log_probs is None


def test_both_models_take_the_same_chunks() -> None:
    """One that is ahead waits; each holds the prompt but its root in the end."""
    pair = make_pair(tiny_llama(), tiny_gpt2(), rows=3)
    models = list(pair.models.values())
    staging = Staging(models, 2, PrefixCache([model.cache for model in models], 2))
    only_target, both = request("a", PROMPT, "target"), request("b", PROMPT, "mmtad")
    assert not staging.ready(only_target)
    assert staging.advance(only_target, 4) == 4
    taken = []
    with torch.inference_mode():
        while not staging.ready(both):
            taken.append(staging.advance(both, 4))
    assert taken == [4, 4, 1]
    assert [model.cache.lengths[2] for model in pair.models.values()] == [9, 9]
