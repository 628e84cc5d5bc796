"""The engine benchmark's rows add up, and its log-probabilities are the target's own."""

import pytest

from benchmarks.decode import configurations, generate, measure, paired_interval, score
from decoding import DecodingConfig, SamplingParams
from tests.decoding.tiny import make_pair, perturbed, tiny_llama

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
PARAMS = SamplingParams(max_tokens=12, temperature=0.0)


def test_every_method_has_a_row_and_speculative_changes_nothing() -> None:
    target = tiny_llama()
    pair = make_pair(target, perturbed(target, 0.05))
    rows = list(measure(pair, PROMPTS, PARAMS, list(configurations([2], 2, 0.5)), batch=2))
    assert [row["method"] for row in rows] == [
        "target", "draft", "speculative", "mtad", "mtad", "mmtad", "mmtad",
    ]  # fmt: skip
    by_method = {row["method"]: row for row in rows}
    assert by_method["target"]["block_efficiency"] == 1
    assert by_method["speculative"]["block_efficiency"] > 1
    assert by_method["speculative"]["difference"] == pytest.approx(0, abs=1e-9)
    assert all(row["tokens"] == 36 and row["length"] == 12 for row in rows)


def test_scores_equal_what_the_engine_reported() -> None:
    pair = make_pair(tiny_llama(), tiny_llama(1))
    results, _ = generate(pair, PROMPTS, PARAMS, DecodingConfig(method="target"), batch=3)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert score(pair, prompt, result.token_ids) == pytest.approx(result.log_probs, abs=1e-9)


def test_interval_is_of_the_paired_differences() -> None:
    mean, low, high = paired_interval([1.0, 2.0, 4.0], [0.0, 1.0, 3.0])
    assert (mean, low, high) == (1.0, 1.0, 1.0)
    mean, low, high = paired_interval([1.0, 3.0], [0.0, 0.0])
    assert mean == 2.0
    assert high - mean == pytest.approx(1.96)
