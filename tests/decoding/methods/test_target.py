"""`target` and `draft`: one token per step from one model."""

from collections import Counter

import pytest

from tests.decoding.tiny import always, chi_square, generate, make_pair, random_markov, request, scripted_pair


@pytest.mark.parametrize(("method", "token"), [("target", 2), ("draft", 4)])
def test_method_uses_its_own_model(method: str, token: int) -> None:
    pair = make_pair(always(2), always(4), vocab_size=6)
    text = generate(pair, request("a", [1], method, temperature=0, max_tokens=5))["a"]
    assert text.token_ids == [token] * 5
    assert [len(output.token_ids) for output in text.steps] == [1] * 5
    assert {output.num_draft_tokens for output in text.steps} == {0}


def test_target_needs_no_draft() -> None:
    text = generate(make_pair(always(2), vocab_size=6), request("a", [1], "target", temperature=0))["a"]
    assert text.token_ids == [2] * 16


def test_samples_follow_the_chain() -> None:
    """3,000 pairs of tokens under p; false failures 1 in 1,000 seeds."""
    p = random_markov(4, 6)
    pair = scripted_pair(p, p, rows=201)
    counts: Counter[tuple[int, ...]] = Counter()
    sequences = [
        request(f"{seed}", [1], "target", max_tokens=2, seed=seed // 3, choice=seed % 3)
        for seed in range(3000)
    ]
    for start in range(0, 3000, 200):
        for text in generate(pair, *sequences[start : start + 200]).values():
            counts[tuple(text.token_ids)] += 1
    law = {(a, b): (p[1, a] * p[a, b]).item() for a in range(4) for b in range(4)}
    assert chi_square(counts, law) > 1e-3
