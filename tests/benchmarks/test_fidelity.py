"""What is said of a model in reduced precision, on distributions that can be worked out by hand."""

import argparse
import math

import pytest
import torch

from benchmarks.fidelity import compare, run

NOTHING = -math.inf


def test_divergence_first_token_and_likelihoods_per_position() -> None:
    exact = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.5, 0.0]]).double().log()
    reduced = torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.5, 0.0]]).double().log()
    found = compare(exact, reduced, [0, 1, 2])
    expected = [
        [0.5 * math.log(2) - 0.25 * math.log(2), 0.0, math.log(0.25), math.log(0.5)],
        [0.0, 1.0, NOTHING, NOTHING],
    ]
    torch.testing.assert_close(found, torch.tensor(expected).double())


def test_float16_weights_are_nearly_exact_and_bfloat16_is_further_off() -> None:
    arguments = argparse.Namespace(
        pair="T", dtypes=["float16", "bfloat16"], workload=None, prompts=2, max_tokens=16, seed=0
    )
    rows = {(row["model"], row["dtype"]): row for row in run(arguments)["rows"]}
    assert len(rows) == 4
    for model in ("target", "draft"):
        float16, bfloat16 = rows[model, "float16"], rows[model, "bfloat16"]
        assert 0 <= abs(float16["kl_nats"]) < 1e-6
        assert float16["perplexity"] > 1
        # Without the instructions for it bfloat16 is upcast, and then as exact as float32.
        assert float16["kl_nats"] <= bfloat16["kl_nats"] + 1e-9
        assert abs(bfloat16["perplexity_change"]) < 0.02
    with pytest.raises(ValueError, match="is not measured with workload"):
        run(argparse.Namespace(**{**vars(arguments), "workload": "chat"}))
