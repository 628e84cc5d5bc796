"""Every log-probability that is reported, against a plain transformers forward over the whole text."""

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from decoding import Engine, FinishReason, ModelPair, Sequence
from tests.decoding.laws import ADJUSTING
from tests.decoding.tiny import (
    METHODS,
    VOCAB,
    Text,
    drain,
    generate,
    llama_pair,
    make_pair,
    perturbed,
    plain,
    request,
    tiny_llama,
)

TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
FIELDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.5, "top_k": 5, "top_p": 0.75},
    {"min_p": 0.125},
    ADJUSTING["all"],
    ADJUSTING["all"] | {"temperature": 0},
]


@pytest.fixture(scope="module")
def pairs() -> dict[str, ModelPair]:
    target = tiny_llama()
    single = copy.deepcopy(target).float()
    return {
        "float64": llama_pair(eos=(2,)),
        "float32": make_pair(single, perturbed(target, 0.2).float(), eos=(2,)),
    }


def assert_tops(tops: Any, expected: Tensor, count: int, tolerance: float) -> None:
    """The `count` likeliest tokens with their values, best first."""
    best = expected.topk(count)
    assert [len(top) for top in tops] == [count] * len(expected)
    assert [[token for token, _ in top] for top in tops] == best.indices.tolist()
    found = torch.tensor([[value for _, value in top] for top in tops], dtype=torch.float64)
    torch.testing.assert_close(found, best.values.double(), rtol=0, atol=tolerance)


def assert_log_probs(pair: ModelPair, sequence: Sequence, text: Text, tolerance: float) -> None:
    """Delivered, top and prompt log-probs of one text, all untransformed and of the serving model."""
    model = pair.models["draft" if sequence.config.method == "draft" else "target"]
    ids, start = [*sequence.prompt_ids, *text.token_ids], len(sequence.prompt_ids)
    expected = plain(model, ids)[:-1]
    values = expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert text.log_probs == pytest.approx(values[start - 1 :], abs=tolerance)
    count = sequence.params.num_top_log_probs
    if count and text.token_ids:
        assert_tops(text.tops, expected[start - 1 :], count, tolerance)
    else:
        assert text.tops == []
    if not sequence.params.prompt_log_probs:
        assert text.prompt_log_probs is None
        return
    assert text.prompt_log_probs is not None
    found = [each.log_prob for each in text.prompt_log_probs]
    assert found == pytest.approx(values[: start - 1], abs=tolerance)
    assert_tops([each.top for each in text.prompt_log_probs], expected[: start - 1], count, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("method", METHODS)
def test_log_probs_equal_a_plain_forward(method: str, dtype: str, pairs: dict[str, ModelPair]) -> None:
    """Rows with and without tops, echo and transforms in one batch; whatever the block they came in.

    Guards values of another node, of the transformed law, of another row's k, of the draft.
    """
    sequences = [
        request(
            str(number),
            [number + 3, 7, 1, 9],
            method,
            max_tokens=14,
            seed=number,
            num_top_log_probs=number % 3 * 2,
            prompt_log_probs=number % 2 == 0,
            **fields,
        )
        for number, fields in enumerate(FIELDS)
    ]
    engine = Engine(pairs[dtype], 8, prefill_chunk=2)
    for sequence in sequences:
        engine.add(sequence)
    texts = drain(engine, check=True)
    for sequence in sequences:
        assert_log_probs(pairs[dtype], sequence, texts[sequence.id], TOLERANCE[dtype])


@pytest.mark.parametrize("method", METHODS)
def test_echo_without_tokens_scores_the_prompt(method: str, pairs: dict[str, ModelPair]) -> None:
    """`max_tokens` 0: nothing is decoded, the draft reports its own."""
    rng = random.Random(1)
    prompt = [rng.randrange(VOCAB) for _ in range(30)]
    sequence = request("a", prompt, method, max_tokens=0, prompt_log_probs=True, num_top_log_probs=3)
    text = generate(pairs["float64"], sequence, prefill_chunk=7)["a"]
    assert (text.token_ids, text.finish_reason) == ([], FinishReason.LENGTH)
    assert_log_probs(pairs["float64"], sequence, text, 1e-9)


def test_echo_beside_decoding_takes_no_row(pairs: dict[str, ModelPair]) -> None:
    """A prompt that is only scored passes through while the others go on, and is delivered once."""
    engine = Engine(pairs["float64"], 2, prefill_chunk=3)
    engine.add(request("long", [3], max_tokens=40, ignore_eos=True))
    engine.step()
    for name in ("a", "b"):
        engine.add(request(name, [5, 6, 7, 8, 9, 10, 3], max_tokens=0, prompt_log_probs=True))
    seen = []
    for _ in range(6):
        outputs = engine.step()
        engine.check_integrity()
        assert any(output.id == "long" for output in outputs)
        seen += [output.id for output in outputs if output.prompt_log_probs is not None]
        assert engine.num_running == 1
    assert seen == ["a", "b"]


def test_adjustments_never_show_in_what_is_reported(pairs: dict[str, ModelPair]) -> None:
    """Not even where they leave one token of the vocabulary."""
    fields = {"logit_bias": tuple((token, -100.0) for token in range(VOCAB) if token != 5), "min_tokens": 3}
    sequence = request("a", [3, 1], "mmtad", max_tokens=6, num_top_log_probs=VOCAB, **fields)
    text = generate(pairs["float64"], sequence)["a"]
    assert text.token_ids == [5] * 6
    assert_log_probs(pairs["float64"], sequence, text, 1e-9)
