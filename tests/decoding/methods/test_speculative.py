"""Speculative decoding: by scripts, token for token at temperature 0; its law above is in test_laws."""

import random

import pytest
import torch

from tests.decoding.tiny import (
    VOCAB,
    always,
    generate,
    llama_pair,
    make_pair,
    random_markov,
    request,
    scripted_pair,
)

ACCEPTANCE = pytest.mark.parametrize("acceptance", ["token", "block"])


@ACCEPTANCE
def test_proof_01_never_accepted(acceptance: str) -> None:
    """Every step delivers the recovered token alone."""
    pair = make_pair(always(2, share=1), always(4, share=1), vocab_size=6)
    text = generate(pair, request("a", [1], "speculative", max_tokens=5, acceptance=acceptance))["a"]
    assert text.token_ids == [2] * 5
    assert [output.num_accepted_tokens for output in text.steps] == [0] * 5
    assert [output.num_draft_tokens for output in text.steps] == [4, 3, 2, 1, 0]


@ACCEPTANCE
@pytest.mark.parametrize("temperature", [0, 1])
def test_proof_01_always_accepted(temperature: float, acceptance: str) -> None:
    """Every step delivers the chain and a bonus."""
    p = random_markov(6, 0)
    sequence = request("a", [1], "speculative", temperature=temperature, max_tokens=15, acceptance=acceptance)
    text = generate(scripted_pair(p, p), sequence)["a"]
    assert [len(output.token_ids) for output in text.steps] == [5, 5, 5]
    assert [output.num_accepted_tokens for output in text.steps] == [4, 4, 4]


@ACCEPTANCE
def test_proof_01_sometimes_accepted(acceptance: str) -> None:
    """The draft knows the cycle 1, 2, 3, 4, 5, 0 but for what follows 3."""
    cycle = torch.eye(6).roll(1, 1)
    wrong = cycle.clone()
    wrong[3] = torch.eye(6)[0]
    text = generate(
        scripted_pair(cycle, wrong), request("a", [0], "speculative", max_tokens=14, acceptance=acceptance)
    )["a"]
    assert text.token_ids == [token % 6 for token in range(1, 15)]
    assert [output.num_accepted_tokens for output in text.steps] == [3, 4, 0, 3]
    assert [len(output.token_ids) for output in text.steps] == [4, 5, 1, 4]


@ACCEPTANCE
def test_proof_04_greedy_equals_target_token_for_token(acceptance: str) -> None:
    """Twenty prompts with EOS; also at a block's every offset, since acceptance varies from 0 to all."""
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))] for _ in range(20)]
    pair = llama_pair(noise=0.1, eos=(2,), rows=41)
    sequences = [
        request(f"{method} {n}", prompt, method, temperature=0, max_tokens=30, acceptance=acceptance)
        for n, prompt in enumerate(prompts)
        for method in ("target", "speculative")
    ]
    texts = generate(pair, *sequences)
    for n in range(20):
        expected, found = texts[f"target {n}"], texts[f"speculative {n}"]
        assert found.token_ids == expected.token_ids
        assert found.finish_reason == expected.finish_reason
    accepted = [output.num_accepted_tokens for n in range(20) for output in texts[f"speculative {n}"].steps]
    assert set(accepted) == {0, 1, 2, 3, 4}
