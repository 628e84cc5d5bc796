"""The embedded pair on real text, in float32: once per run, since it takes a minute."""

from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from benchmarks.workloads import chat_ids, load_prompts
from decoding import (
    METHODS,
    DecodingConfig,
    Engine,
    ModelPair,
    SamplingParams,
    Sequence,
    load_model_pair,
    prepare_embedded_pair,
)

pytestmark = pytest.mark.slow

CANCELLED_AFTER_STEPS = 12


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return load_model_pair(*prepare_embedded_pair(), dtype="float32", max_model_len=512, max_num_seqs=16)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(prepare_embedded_pair()[0])
    return [chat_ids(tokenizer, each.prompt) for each in load_prompts("chat", 20)]


def decode(
    pair: ModelPair, sequences: list[Sequence], cancelled: frozenset[str] = frozenset()
) -> dict[str, list[int]]:
    engine = Engine(pair, 16)
    for sequence in sequences:
        engine.add(sequence)
    texts: dict[str, list[int]] = {sequence.id: [] for sequence in sequences}
    num_steps = 0
    while engine.has_work():
        for output in engine.step():
            texts[output.id] += output.token_ids
        engine.check_integrity()
        num_steps += 1
        if num_steps == CANCELLED_AFTER_STEPS:
            for sequence_id in cancelled:
                assert engine.cancel(sequence_id)
    assert engine.num_free_rows == 16
    return texts


def test_greedy_speculative_equals_target_token_for_token(pair: ModelPair, prompts: list[list[int]]) -> None:
    """Guards the lossless claim where it matters: real weights, real text, a draft that is often wrong."""
    params = SamplingParams(max_tokens=32, temperature=0)
    texts = {
        method: decode(
            pair,
            [
                Sequence(str(index), prompt, params, DecodingConfig(method=method))
                for index, prompt in enumerate(prompts)
            ],
        )
        for method in ("target", "speculative")
    }
    assert texts["speculative"] == texts["target"]


def test_mixed_requests_get_the_text_they_get_alone(pair: ModelPair, prompts: list[list[int]]) -> None:
    """Guards against neighbours, cancellations and row moves leaking into a text."""
    sequences = [
        Sequence(
            id=str(index),
            prompt_ids=prompts[index],
            params=SamplingParams(
                max_tokens=5 + 2 * index, temperature=(0.0, 1.0)[index % 2], top_p=0.9, top_k=50, seed=index
            ),
            config=DecodingConfig(method=METHODS[index % len(METHODS)], num_speculative_tokens=3),  # type: ignore[arg-type]
        )
        for index in range(16)
    ]
    cancelled = frozenset({"12", "15"})
    together = decode(pair, [replace(each, output_ids=[]) for each in sequences], cancelled)
    for sequence in sequences:
        if sequence.id not in cancelled:
            assert decode(pair, [sequence])[sequence.id] == together[sequence.id], sequence.config
