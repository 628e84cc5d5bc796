"""Speculative decoding is lossless: by scripts, token for token at temperature 0, by law above."""

import itertools
import random
from collections import Counter
from typing import Any

import pytest
import torch

from tests.decoding.test_sampler import transformed
from tests.decoding.tiny import (
    VOCAB,
    always,
    chi_square,
    generate,
    llama_pair,
    make_pair,
    random_markov,
    request,
    scripted_pair,
)

STEPS = 3


def test_proof_01_never_accepted() -> None:
    """Every step delivers the recovered token alone."""
    pair = make_pair(always(2, share=1), always(4, share=1), vocab_size=6)
    text = generate(pair, request("a", [1], "speculative", temperature=1, max_tokens=5))["a"]
    assert text.token_ids == [2] * 5
    assert [output.num_accepted_tokens for output in text.steps] == [0] * 5
    assert [output.num_draft_tokens for output in text.steps] == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("temperature", [0, 1])
def test_proof_01_always_accepted(temperature: float) -> None:
    """Every step delivers the chain and a bonus."""
    p = random_markov(6, 0)
    text = generate(
        scripted_pair(p, p), request("a", [1], "speculative", temperature=temperature, max_tokens=15)
    )["a"]
    assert [len(output.token_ids) for output in text.steps] == [5, 5, 5]
    assert [output.num_accepted_tokens for output in text.steps] == [4, 4, 4]


def test_proof_01_sometimes_accepted() -> None:
    """The draft knows the cycle 1, 2, 3, 4, 5, 0 but for what follows 3."""
    cycle = torch.eye(6).roll(1, 1)
    wrong = cycle.clone()
    wrong[3] = torch.eye(6)[0]
    text = generate(scripted_pair(cycle, wrong), request("a", [0], "speculative", max_tokens=14))["a"]
    assert text.token_ids == [token % 6 for token in range(1, 15)]
    assert [output.num_accepted_tokens for output in text.steps] == [3, 4, 0, 3]
    assert [len(output.token_ids) for output in text.steps] == [4, 5, 1, 4]


def test_proof_04_greedy_equals_target_token_for_token() -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))] for _ in range(20)]
    pair = llama_pair(noise=0.1, eos=(2,), rows=21)
    sequences = [
        request(f"{method} {n}", prompt, method, temperature=0, max_tokens=30)
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


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"top_p": 0.75},
        {"temperature": 1.0, "min_p": 0.25, "top_k": 4},
    ],
    ids=str,
)
def test_proof_03_three_tokens_follow_p(fields: dict[str, Any]) -> None:
    """4,000 texts through the whole engine, gamma 2, against exact p; false failures 1 in 1,000 seeds."""
    p, q = random_markov(5, 11, zeros=1), random_markov(5, 12, zeros=1)
    pair = scripted_pair(p, q, rows=201)
    sequences = [
        request(
            str(seed), [1], "speculative", num_speculative_tokens=2, max_tokens=STEPS, seed=seed, **fields
        )
        for seed in range(4000)
    ]
    texts = {}
    for start in range(0, 4000, 200):
        texts |= generate(pair, *sequences[start : start + 200])
    counts = Counter(tuple(text.token_ids) for text in texts.values())
    params = sequences[0].params
    law = torch.tensor([transformed(row.log().tolist(), params) for row in p], dtype=torch.float64).exp()
    exact = {
        text: (law[1, text[0]] * law[text[0], text[1]] * law[text[1], text[2]]).item()
        for text in itertools.product(range(5), repeat=STEPS)
    }
    assert chi_square(counts, exact) > 1e-3
    accepted = sum(output.num_accepted_tokens for text in texts.values() for output in text.steps)
    assert 0 < accepted < 2 * 4000
